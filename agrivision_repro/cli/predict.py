"""`agrivision predict`, `export`, `share` and `submission`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agrivision_repro.cli.data import DataName
from agrivision_repro.cli.options import Device, Precision

if TYPE_CHECKING:
    from agrivision_repro.predict.scenes import Scene
    from agrivision_repro.predict.trained import About
    from agrivision_repro.predict.windows import Predictor


def _expand_home(path: Path | str | None) -> Path | str | None:
    "Return a path with its ~ replaced, which a shell leaves in --out=~/maps."
    return path and type(path)(os.path.expanduser(path))  # Path.expanduser raises for ~ and a name that is no user's


_ResultsFolder = Annotated[Path, typer.Option("--results", callback=_expand_home, help="Folder of all results, which contains the run.")]


_FinishedRun = Annotated[str, typer.Argument(help="A finished run: the first digits of its id.")]


_Checkpoint = Annotated[str, typer.Option(help="last, or best on the validation tiles.")]


_Images = Annotated[list[Path], typer.Argument(metavar="INPUT", help="TIFF, JPEG or PNG files, images/rgb/NAME.jpg, or folders of these.")]
_MapsFolder = Annotated[Path, typer.Option("--out", "-o", callback=_expand_home, help="Folder of the maps.")]


_Submission = Annotated[
    Path | None, typer.Option("--submission", callback=_expand_home, help="Write the challenge's zip here, after checking it.")
]


def predict(
    model: Annotated[str, typer.Argument(help="The first digits of a run's id, a folder of share, an .onnx, or your own .pt2: it can run code.")],
    images: _Images,
    out: _MapsFolder,
    tta: Annotated[str, typer.Option(help="none, or d4: average over the eight flips and rotations of each window.")] = "none",
    checkpoint: _Checkpoint = "last",
    channels: Annotated[str, typer.Option(help="rgb or nir3, for a run on three channels. Default: its own.")] = "",
    bands: Annotated[str, typer.Option(help="Bands of red, green, blue, NIR, such as 3,2,1,4. Default: as the file declares.")] = "",
    scale: Annotated[float, typer.Option(help="Stored value that becomes 255, such as 10000 or 1. Default: files have bytes.")] = 0,
    window: Annotated[int, typer.Option(min=0, help="Side of the sliding window, pixels; 0: the run's crop, or 512.")] = 0,
    overlap: Annotated[float, typer.Option(help="Share of a window that the next one also covers.")] = 0.5,
    pictures: Annotated[bool, typer.Option(help="Draw RGB, NIR and the prediction for each image.")] = True,
    submission: _Submission = None,
    data_root: Annotated[
        str, typer.Option(callback=_expand_home, help="Folder of the data whose test set the zip must cover. Default: the inputs.")
    ] = "",
    results: _ResultsFolder = Path("out"),
    device: Device = "auto",
    precision: Precision = "auto",
):
    "Predict images of any size: a class map, all classes as bits, a picture, and a cloud-optimized GeoTIFF if the input is georeferenced."
    from agrivision_repro.predict.scenes import find_scenes

    options = {"tta": tta, "checkpoint": checkpoint, "channels": channels, "device": device, "precision": precision}
    (predictor, settings), scenes = _open_predictor(model, results, options), find_scenes(images)
    wanted = plan_submission(predictor.about, data_root, {scene.name for scene in scenes}) if submission else None
    work = _plan_maps(predictor, bands, scale, settings=settings, out=out, window=window, overlap=overlap, has_picture=pictures)
    sizes = _predict_all(scenes, work, predictor.about.classes)
    if len(sizes) < len(scenes):
        if submission:
            print(f"agrivision: {submission} was not written", file=sys.stderr)
        raise typer.Exit(1)
    if submission:
        _write_zip(out / "labels", submission, wanted or sizes)


def export(
    run: _FinishedRun,
    file: Annotated[Path, typer.Argument(help="The file to write: NAME.pt2 (torch.export) or NAME.onnx.")],
    checkpoint: _Checkpoint = "last",
    results: _ResultsFolder = Path("out"),
):
    "Write a trained model as one file, from bytes to logits, and compare it with the model."
    from agrivision_repro.predict.export import export_model
    from agrivision_repro.runs.store import find_run

    result = find_run(results, run).result()
    worst = export_model(result, file, checkpoint)
    classes = ", ".join(result.run.edition.classes)
    what = "R, G, B, NIR bytes (B, 4, H, W) to logits of"
    print(f"{file}: {result.run.title}; {what} {classes}; differs from the model by at most {worst:.1g} of the largest logit")


def share(
    run: _FinishedRun,
    folder: Annotated[Path, typer.Argument(help="A new folder: weights, description, model card.")],
    push: Annotated[
        str, typer.Option(metavar="OWNER/NAME", help="Upload it to this repository of the Hugging Face Hub; a new one is private.")
    ] = "",
    checkpoint: _Checkpoint = "last",
    results: _ResultsFolder = Path("out"),
):
    "Write a trained model as a folder for other people, who need neither the run nor its data."
    from agrivision_repro.predict.share import push_folder, share_run
    from agrivision_repro.runs.store import find_run

    share_run(find_run(results, run).result(), folder, checkpoint)
    print(f"{folder}: read its README.md before others do; maps: agrivision predict {folder} IMAGE --out MAPS")
    if push:
        print(push_folder(folder, push))


def _open_predictor(
    model: str,  # the start of a Run's id, a folder of `share`, or a file of `export`
    results: Path,
    options: dict,  # of `windows.load_predictor`
) -> tuple[Predictor, str]:  # the model, and what its maps depend on
    "Open a Run, a shared folder or an exported file."
    from agrivision_repro.predict.export import WRITERS, open_predictor
    from agrivision_repro.predict.windows import load_predictor
    from agrivision_repro.runs.store import find_run

    path = Path(model)
    if not path.exists() and (len(path.parts) > 1 or path.suffix in WRITERS):
        raise FileNotFoundError(f"{model} does not exist: name a folder of agrivision share, a file of agrivision export, or a Run")
    if path.is_dir() or path.suffix in WRITERS:
        predictor, weights = open_predictor(path, **options), path / "model.safetensors" if path.is_dir() else path
    else:
        result = find_run(results, model).result()
        predictor, weights = load_predictor(result, **options), result.folder.weights(options["checkpoint"])
    found = weights.stat()
    return predictor, f"{weights.parent.name} {weights.name} {found.st_size} {found.st_mtime_ns} {options | {'device': ''}}"


def _plan_maps(
    predictor: Predictor,
    bands: str,
    scale: float,
    **maps: object,  # of `images.predict_scene`
) -> Callable:  # predicts a scene
    "Check all options before anything is computed, and say where maps go."
    from agrivision_repro.predict.bands import plan_reading
    from agrivision_repro.predict.images import predict_scene
    from agrivision_repro.predict.windows import window_starts

    about = predictor.about
    maps["window"] = maps["window"] or about.window
    window_starts(1, maps["window"], maps["overlap"])
    reading = plan_reading(about.channels, bands, scale)
    print(f"{about.title}; maps go to {maps['out']}")
    return partial(predict_scene, predictor=predictor, classes=about.classes, reading=reading, origin=about.title, **maps)


def _predict_all(
    scenes: Sequence[Scene],
    work: Callable,  # from `_plan_maps`
    classes: Sequence[str],
) -> dict[str, tuple[int, int]]:  # name of each predicted image → height, width, pixels
    "Predict images one after the other, with the time left in a terminal; name each that cannot be read."
    from tqdm import tqdm

    from agrivision_repro.data.tiles import BadFile

    sizes, form = {}, "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}]"
    with tqdm(total=len(scenes), desc="predicting", bar_format=form, leave=False, disable=None) as bar:
        for n_done, scene in enumerate(scenes, 1):
            try:
                found = work(scene, advance=bar.update)
                sizes[found.name] = found.size
                bar.write(found.as_text(classes))
            except (BadFile, FileNotFoundError) as error:
                bar.write(f"agrivision: {error}", file=sys.stderr)
            bar.update(n_done - bar.n)
    if len(sizes) < len(scenes) > 1:
        remedy = "named above; the same command keeps the finished maps and predicts the others"
        print(f"agrivision: {len(scenes) - len(sizes)} of {len(scenes)} images not predicted, {remedy}", file=sys.stderr)
    return sizes


def _write_zip(labels: Path, path: Path, sizes: dict[str, tuple[int, int]]) -> None:
    "Write the challenge's zip and say what it contains."
    from agrivision_repro.predict.submission import write_submission

    write_submission(labels, path, sizes)
    print(f"{path}: {len(sizes)} maps, all rules of the challenge met")


def plan_submission(
    about: About,  # of the model
    data_root: str,  # "": not given
    names: set[str],  # of the inputs
) -> dict[str, tuple[int, int]]:  # name of each test tile → height, width, pixels; empty: the zip covers the inputs
    "Check that a model and the inputs can make a submission; raise ValueError if not."
    from agrivision_repro.predict.submission import CHALLENGE_CLASSES, tile_sizes

    if tuple(about.classes) != CHALLENGE_CLASSES:
        raise ValueError(f"the model's classes are {', '.join(about.classes)}: a submission needs {', '.join(CHALLENGE_CLASSES)}")
    wanted = tile_sizes(about.data, data_root) if data_root else {}
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
    data_root: Annotated[
        str, typer.Option(callback=_expand_home, help="Folder of the data; its test set gives names and sizes. Default: any, 512×512.")
    ] = "",
    data: DataName = "",
):
    "List every rule of the challenge that a submission breaks."
    from agrivision_repro.data.editions import detect_edition
    from agrivision_repro.predict.submission import check_submission, tile_sizes

    faults = check_submission(path, tile_sizes(data or detect_edition(data_root), data_root) if data_root else None)
    met = f"{len(faults)} faults, listed above" if faults else "all rules of the challenge met"
    print(*faults, f"{path}: {met}", sep="\n")
    raise typer.Exit(1 if faults else 0)
