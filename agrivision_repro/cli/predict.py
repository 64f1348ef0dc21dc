"""`agrivision predict` and `agrivision submission`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agrivision_repro.cli.data import DataName
from agrivision_repro.cli.options import Device, Precision

_ResultsFolder = Annotated[Path, typer.Option("--results", help="Folder of all results, which contains the run.")]


_MapsFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder of the maps.")]


_Submission = Annotated[Path | None, typer.Option("--submission", help="Write the challenge's zip here, after checking it.")]


def predict(
    run: Annotated[str, typer.Argument(help="A finished run: the first digits of its id.")],
    images: Annotated[list[Path], typer.Argument(metavar="INPUT", help="Four-band TIFFs, images/rgb/NAME.jpg, or a folder of pairs.")],
    out: _MapsFolder,
    tta: Annotated[str, typer.Option(help="none, or d4: average over the eight flips and rotations of each window.")] = "none",
    checkpoint: Annotated[str, typer.Option(help="last, or best on the validation tiles.")] = "last",
    channels: Annotated[str, typer.Option(help="rgb or nir3, for a run on three channels. Default: its own.")] = "",
    window: Annotated[int, typer.Option(min=0, help="Side of the sliding window, pixels; 0: the run's crop, or 512.")] = 0,
    overlap: Annotated[float, typer.Option(help="Share of a window that the next one also covers.")] = 0.5,
    pictures: Annotated[bool, typer.Option(help="Draw RGB, NIR and the prediction for each image.")] = True,
    submission: _Submission = None,
    data_root: Annotated[str, typer.Option(help="Folder of the data whose test set the zip must cover. Default: the inputs.")] = "",
    results: _ResultsFolder = Path("out"),
    device: Device = "auto",
    precision: Precision = "auto",
):
    "Predict images of any size: a class map, all classes as bits, a picture, and a GeoTIFF if the input is georeferenced."
    from agrivision_repro.predict.images import predict_scene  # fmt: skip
    from agrivision_repro.predict.scenes import find_scenes  # fmt: skip
    from agrivision_repro.predict.submission import write_submission  # fmt: skip
    from agrivision_repro.predict.windows import describe_model, load_predictor, own_window, window_starts  # fmt: skip
    from agrivision_repro.runs.store import find_run

    result, scenes = find_run(results, run).result(), find_scenes(images)
    wanted = plan_submission(result.run, data_root, {scene.name for scene in scenes}) if submission else None
    window_starts(1, window or own_window(result), overlap)  # fail on a bad value before computing anything
    predictor, classes, sizes = load_predictor(result, checkpoint, tta, channels, device, precision), result.run.edition.classes, {}
    print(f"{describe_model(result)}; maps go to {out}")
    for scene in scenes:
        found = predict_scene(scene, predictor, out, classes, window or own_window(result), overlap, pictures, describe_model(result))
        sizes[found.name] = found.size
        print(found.as_text(classes))
    if submission:
        write_submission(out / "labels", submission, wanted or sizes)
        print(f"{submission}: {len(wanted or sizes)} maps, all rules of the challenge met")


def plan_submission(
    run,
    data_root: str,  # "": not given
    names: set[str],  # of the inputs
) -> dict[str, tuple[int, int]]:  # name of each test tile → height, width, pixels; empty: the zip covers the inputs
    "Check that a Run and the inputs can make a submission; raise ValueError if not."
    from agrivision_repro.predict.submission import CHALLENGE_CLASSES, tile_sizes

    if run.edition.classes != CHALLENGE_CLASSES:
        raise ValueError(f"the run's classes are {', '.join(run.edition.classes)}: a submission needs {', '.join(CHALLENGE_CLASSES)}")
    wanted = tile_sizes(run.source.name, data_root) if data_root else {}
    lacking = [name for name in wanted if name not in names]
    if lacking:
        shown = ", ".join(lacking[:4]) + ", …" * (len(lacking) > 4)
        raise ValueError(f"the inputs lack {len(lacking)} of {len(wanted)} test tiles ({shown}): pass the folder of the test set as input")
    return wanted


submission_app = typer.Typer(help="Check a submission to the challenge.", no_args_is_help=True)


@submission_app.callback()
def submission_group() -> None:
    "Check a submission to the challenge."


@submission_app.command("check")
def check_zip(
    path: Annotated[Path, typer.Argument(help="A zip, or a folder of PNGs.")],
    data_root: Annotated[str, typer.Option(help="Folder of the data; its test set gives names and sizes. Default: any, 512×512.")] = "",
    data: DataName = "",
):
    "List every rule of the challenge that a submission breaks."
    from agrivision_repro.data.editions import detect_edition
    from agrivision_repro.predict.submission import check_submission, tile_sizes

    faults = check_submission(path, tile_sizes(data or detect_edition(data_root), data_root) if data_root else None)
    met = f"{len(faults)} faults, listed above" if faults else "all rules of the challenge met"
    print(*faults, f"{path}: {met}", sep="\n")
    raise typer.Exit(1 if faults else 0)
