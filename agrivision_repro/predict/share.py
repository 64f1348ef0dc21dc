"""A trained model as a folder for other people, with a model card, and on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from agrivision_repro.core import REPOSITORY
from agrivision_repro.predict.trained import About, load_trained
from agrivision_repro.runs.listing import format_percent
from agrivision_repro.runs.run import Run, describe_run
from agrivision_repro.runs.store import Result, metric_label

_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.j2"


def share_run(
    result: Result,
    folder: Path,  # a new or empty one
    checkpoint: str = "last",  # or "best"
) -> None:
    "Write a Run's model, its description and its model card; raise ValueError if the folder has other files."
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: name a new one")
    model = load_trained(result, checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    make_card(result, model.about, checkpoint).save(folder / "README.md")  # first: save_pretrained keeps it
    model.save_pretrained(folder)


def push_folder(
    folder: Path,  # of `share_run`
    name: str,  # OWNER/NAME
) -> str:  # its address
    "Upload a folder to the Hub, a new repository as a private one; raise ValueError if that fails."
    try:
        address = HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
        return str(address)
    except Exception as error:  # the network
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder} is complete, but not on the Hub ({reason}): hf auth login, then hf upload {name} {folder}") from error


def make_card(result: Result, about: About, checkpoint: str) -> ModelCard:
    "Make the model card of a Run."
    run, found = result.run, result.checkpoints[checkpoint]
    fields = describe_run(run)
    recipe = fields.pop("recipe")
    return ModelCard.from_template(
        _describe_card(run, found["scores"]),
        template_path=str(_TEMPLATE),
        about=about, run=run, record=result.record, repository=REPOSITORY, checkpoint=checkpoint, iteration=found["iteration"],
        recipe=_join(recipe), fields=_join(pd.json_normalize(fields).iloc[0].to_dict()), rows=_score_rows(found["scores"]),
    )  # fmt: skip


def _join(fields: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items() if value not in ("", None))


def _score_rows(scores: dict) -> list[list[str]]:  # tested on, score, mean, all background, each class
    "Format all scores in percent."
    return [
        [channels, metric_label(metric), *map(format_percent, [score["mean"], score["background_only"], *score["per_class"]])]
        for channels, by_metric in scores.items()
        for metric, score in by_metric.items()
    ]


def _describe_card(run: Run, scores: dict) -> ModelCardData:
    "Return the card's metadata, which the Hub reads."
    task = {"task_type": "image-segmentation", "dataset_type": run.source.name, "dataset_name": run.edition.title, "metric_type": "mean_iou"}
    means = {channels: by_metric["multilabel"]["mean"] for channels, by_metric in scores.items()}
    return ModelCardData(
        license="apache-2.0" if run.source.name == "synthetic" else "other",  # of the weights: the data's
        library_name="agrivision_repro",
        pipeline_tag="image-segmentation",
        tags=["remote-sensing", "agriculture", "near-infrared"],
        model_name=run.title,
        eval_results=[EvalResult(**task, metric_value=mean, metric_name=f"mIoU on {channels}") for channels, mean in means.items()],
    )
