"""Studies: an experiment in several variants, each with several seeds."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias

import pydantic
from pydantic import Field

from official_selftrain.config.build import ConfigModel, model_from_dict
from official_selftrain.config.experiments import (
    experiment_settings,
    resolve_layers,
    study_settings,
)
from official_selftrain.config.overrides import merge, nested, parse_override
from official_selftrain.config.schema import Config, plain
from official_selftrain.config.stages import check_stages
from official_selftrain.config.values import Seed, Text, Words
from official_selftrain.utils.errors import UserError, or_nearest, short
from official_selftrain.utils.types import StrPath

Cell: TypeAlias = tuple[str, int]  # (variant, seed)


class StudyConfig(ConfigModel):
    """What a study runs: every variant of an experiment with every seed."""

    study: Text = Field(description="Name of the study, and of the folder of its results.")
    description: Words = Field(default="", description="What it asks, in one line.")
    experiment: Text = Field(description="Name of the experiment that the variants change.")
    overrides: tuple[Text, ...] = Field(
        default=(), description="Settings of all variants, as `--params_override` takes them."
    )
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = Field(
        default=(0, 1, 2), description="Each variant runs once with each of these numbers."
    )
    seed_keys: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        default=("trainer.seed",), description="Settings that take the number."
    )
    variants: Annotated[
        dict[Text, dict[str, pydantic.JsonValue]],
        pydantic.BeforeValidator(plain),
        Field(min_length=1),
    ] = Field(
        description=(
            "Settings of each variant, by dotted key such as `self_training.alpha`; `experiment` "
            "takes another experiment."
        )
    )
    x: Text | None = Field(
        default=None,
        description="Setting that is drawn as the horizontal axis, such as `self_training.alpha`.",
    )
    may_diverge: bool = Field(
        default=False,
        description="Count a training whose loss is not finite as a result, not as a failure.",
    )

    @pydantic.field_validator("study")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError("names a folder: use letters, digits and underscores")
        return name

    @pydantic.field_validator("seeds")
    @classmethod
    def _differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("has a number twice, which would count one run as two")
        return seeds


def load_study(name: str) -> StudyConfig:
    """Loads a study by its name or by `FILE.py:NAME`, which executes the file.

    Raises:
        UserError: if there is no such study, or for a wrong setting, with the nearest name.
    """
    return model_from_dict(StudyConfig, study_settings(name), f"study {name!r}")


def variant_configs(
    study: StudyConfig, overrides: Sequence[str] = (), data_dir: StrPath | None = None
) -> dict[Cell, Config]:
    """The checked config of each variant with each seed; all variants of the first seed come first.

    Args:
        study: what is run.
        overrides: settings of all runs, which win over those of the study.
        data_dir: folder at which relative paths of the data start.

    Raises:
        UserError: if a variant has a wrong setting, with its name and the nearest known setting, or
            lacks what a stage needs.
    """
    configs = {}
    for seed in study.seeds:
        for name in study.variants:
            label = f"variant {name!r}"
            try:
                configs[name, seed] = _variant_config(study, name, seed, overrides, data_dir)
            except UserError as error:
                text = str(error)
                raise UserError(text if label in text else f"{label}: {text}") from None
    return configs


def _variant_config(study, name, seed, overrides, data_dir):
    changes = dict(study.variants[name])
    experiment = str(changes.pop("experiment", study.experiment))
    config = resolve_layers(
        [
            (f"experiment {experiment!r}", experiment_settings(experiment)),
            *((f"overrides {short(text)}", parse_override(text)) for text in study.overrides),
            (f"variant {name!r}", _nested(changes)),
            *((f"--params_override {short(text)}", parse_override(text)) for text in overrides),
            ("seed_keys", _nested(dict.fromkeys(study.seed_keys, seed))),
        ],
        data_dir,
    )
    if config.evaluation is None or not config.evaluation.given:
        raise UserError("nothing to evaluate on: set evaluation.records, or images")
    if config.pseudo is not None:  # without it the variant is one supervised training
        check_stages(config)
    if study.x is not None:
        number_at(config, study.x)
    return config


def _nested(changes):
    merged: dict[str, Any] = {}
    for key, value in changes.items():
        merged = merge(merged, nested(key, value))
    return merged


def number_at(config: Config, key: str) -> float:
    """The number that a config has at a dotted key.

    Raises:
        UserError: if there is no such key, with the nearest one, or if it holds no number.
    """
    value: Any = config.model_dump()
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            near = or_nearest(part, list(value)) if isinstance(value, dict) else ""
            raise UserError(f"x: unknown key {key!r}{near}")
        value = value[part]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"x: {key} must be a number (given {short(value)})")
    return value
