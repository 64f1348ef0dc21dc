"""Options that several commands share, and values given as text."""

from __future__ import annotations

import ast
from typing import Annotated

import typer


def read_value(text: str):  # a Python value
    "Parse `0.5`, `[0, 1]`, `true`, `False` or plain text."
    try:
        return ast.literal_eval(text.title() if text in ("true", "false") else text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # "{[]: 1}", deeply nested brackets
        return text


def check_type(value, like, pair: str):  # the value
    "Check that a value has the type of another; an integer is accepted for a float."
    if type(value) is int and type(like) is float and abs(value) < 2**63:  # much larger ones overflow a float
        value = float(value)
    if type(value) is not type(like):
        raise ValueError(f"parameter {pair!r}: wanted {type(like).__name__}, like {like!r}")
    return value


def read_parameters(
    pairs: list[str],  # `NAME=VALUE`
    known: dict,  # name → default
) -> dict:
    "Parse parameters for notebooks; raise ValueError for unknown ones."
    given = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in known:
            raise ValueError(f"unknown parameter {pair!r}: wanted one of {', '.join(known)}, as NAME=VALUE")
        given[name] = text if name == "seeds" else check_type(read_value(text), known[name], pair)  # see `tables.check_seeds`
    return given


ScaleName = Annotated[
    str,
    typer.Option("--scale", help="smoke: seconds. laptop: minutes, two cores. workstation: one GPU, open data. paper: 25,000 iterations."),
]


RunData = Annotated[str, typer.Option("--data", help="synthetic, naip-trees, ag-net, agrivision-{2020,2021,cvpr2020}, or classes:NAME,…")]


DataRoot = Annotated[str, typer.Option(help="Folder of the data; not needed for synthetic.")]


Out = Annotated[str, typer.Option(help="Folder of all results; finished runs in it are reused.")]


Device = Annotated[str, typer.Option(help="auto: a GPU if there is one. cpu.")]


Precision = Annotated[str, typer.Option(help="auto: bf16 if the device supports it, else float32. bf16. float32.")]
