"""`agrivision data`: check, stats, show, pack, split, unpack, fetch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(help="Unpack, split, check, describe, show and pack a data set.", no_args_is_help=True)


_Root = Annotated[Path, typer.Argument(help="Folder of the data set.")]


DataName = Annotated[str, typer.Option("--data", help="Its edition, or classes:NAME,NAME,… for your own. Default: detected.")]


_Workers = Annotated[int, typer.Option(help="Processes; 0: one per core.")]


_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@data_app.command()
def check(root: _Root, data: DataName = "", workers: _Workers = 0, as_json: _AsJson = False):
    "Read every file, report statistics and list every fault."
    from agrivision_repro.data.check import check_data

    report = check_data(root, data, workers, shows_progress=True)
    print(json.dumps(report.as_json(), indent=1) if as_json else report.as_text())
    raise typer.Exit(0 if report.is_trustworthy else 1)


@data_app.command()
def stats(root: _Root, data: DataName = "", workers: _Workers = 0, as_json: _AsJson = False):
    "Print mean and standard deviation per channel, pixels and share per class, over valid pixels."
    from agrivision_repro.data.check import check_data

    report = check_data(root, data, workers, shows_progress=True)
    if as_json:
        print(json.dumps(report.as_json()["splits"], indent=1))
    else:
        for split, is_labeled in report.labeled.items():
            classes = report.class_table(split) if is_labeled else "without labels"
            print(f"{split}: {report.describe(split)['tiles']} tiles; channels: values from 0 to 1, over valid pixels", report.channel_table(split), classes, "", sep="\n")
    if not report.is_trustworthy:
        print(f"{len(report.faults)} faults, not included here: see agrivision data check {root}", file=sys.stderr)
        raise typer.Exit(1)


@data_app.command()
def show(
    root: _Root,
    data: DataName = "",
    split: Annotated[str, typer.Option(help="train, val or test.")] = "train",
    n_tiles: Annotated[int, typer.Option("-n", min=1, help="How many tiles, evenly spread over the split.")] = 6,
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture: .png, .pdf or .svg.")] = Path("contact_sheet.png"),
):
    "Draw a contact sheet: RGB, NIR, their contrast, outlined labels, hatched invalid pixels."
    from agrivision_repro.data.editions import detect_edition
    from agrivision_repro.data.pack import open_split
    from agrivision_repro.data.tiles import contact_sheet

    sheet = contact_sheet(open_split(data or detect_edition(root), root, split), n_tiles)
    sheet.savefig(out, dpi=150)
    print(out)


@data_app.command()
def pack(root: _Root, data: DataName = "", workers: _Workers = 0):
    "Decode every split once into ROOT/packed, from which training then reads."
    from agrivision_repro.data.editions import detect_edition, open_splits
    from agrivision_repro.data.pack import pack_folder, pack_split

    data = data or detect_edition(root)
    for tiles in open_splits(data, root):
        packed = pack_split(tiles, pack_folder(data, root), workers, shows_progress=True)
        print(f"{packed.folder}: {len(packed)} tiles, fingerprint {packed.fingerprint}")


@data_app.command()
def split(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder with images/{rgb,nir} and labels/CLASS, without train and val.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    val: Annotated[float, typer.Option(help="Share of the fields for val.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Seed that draws the fields of val.")] = 0,
):
    "Copy a data set that is in one folder into train and val, by field: the text before the first underscore of a name."
    from agrivision_repro.data.editions import field_of
    from agrivision_repro.data.split import split_by_field

    for name, tiles in split_by_field(source, folder, val, seed).items():
        print(f"{name}: {len(tiles)} tiles of {len(set(map(field_of, tiles)))} fields")
    print(f"{folder}: next, agrivision data check {folder}")


@data_app.command()
def unpack(
    archive: Annotated[Path, typer.Argument(help="A .tar, .tar.gz or .zip.")],
    folder: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")],
):
    "Unpack an archive into a new folder; refuse one that would write outside it."
    from agrivision_repro.data.archives import unpack_archive

    print(unpack_archive(archive, folder))


@data_app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="An open data set: naip-trees or ag-net.")],
    folder: Annotated[Path | None, typer.Option("--out", "-o", help="A new folder, or one fetched earlier. Default: NAME.")] = None,
    source: Annotated[str, typer.Option(help="Your own copy: a folder, an archive, or the URL of an archive. Default: GitHub.")] = "",
    workers: _Workers = 0,
):
    "Download an open data set, verify every byte against its git tree id, and check it."
    from agrivision_repro.data.fetch import fetch_data

    report = fetch_data(name, folder or name, source, workers, shows_progress=True)
    raise typer.Exit(0 if report.is_trustworthy else 1)
