"""Typed configuration: groups of settings, YAML in and out, overrides, and experiments.

It imports neither Keras nor TensorFlow, so that a typo is answered within a second. Later sources
win: the experiment, then `--config_file`, then each `--params_override`.
"""

from official_selftrain.config.build import changed, choices, model_from_dict
from official_selftrain.config.experiments import (
    PACKAGE,
    config_from_dict,
    experiment_settings,
    load,
    load_experiment,
    load_experiments,
    load_studies,
    resolve,
    resolve_layers,
)
from official_selftrain.config.lengths import (
    default_batch_size,
    default_steps,
    with_batches,
    with_length,
)
from official_selftrain.config.networks import BACKBONES
from official_selftrain.config.overrides import (
    dump,
    load_file,
    load_yaml,
    merge,
    nested,
    parse_override,
)
from official_selftrain.config.schema import (
    STRATEGIES,
    Config,
    OptimizerConfig,
    RuntimeConfig,
    SelectionConfig,
    SelfTrainingConfig,
    TrainerConfig,
)
from official_selftrain.config.sources import (
    EvaluationConfig,
    HumanConfig,
    InputConfig,
    PseudoConfig,
    SourceConfig,
    UnlabeledConfig,
)
from official_selftrain.config.stages import (
    check_stages,
    control_config,
    rounds,
    stages,
    student_config,
    teacher_config,
)
from official_selftrain.config.studies import StudyConfig, load_study, variant_configs
from official_selftrain.config.tasks import DetectionConfig, NmsConfig, SegmentationConfig
from official_selftrain.config.values import MAX_CLASSES, MAX_SIDE

__all__ = [
    "BACKBONES",
    "MAX_CLASSES",
    "MAX_SIDE",
    "PACKAGE",
    "STRATEGIES",
    "Config",
    "DetectionConfig",
    "EvaluationConfig",
    "HumanConfig",
    "InputConfig",
    "NmsConfig",
    "OptimizerConfig",
    "PseudoConfig",
    "RuntimeConfig",
    "SegmentationConfig",
    "SelectionConfig",
    "SelfTrainingConfig",
    "SourceConfig",
    "StudyConfig",
    "TrainerConfig",
    "UnlabeledConfig",
    "changed",
    "check_stages",
    "choices",
    "config_from_dict",
    "control_config",
    "default_batch_size",
    "default_steps",
    "dump",
    "experiment_settings",
    "load",
    "load_experiment",
    "load_experiments",
    "load_file",
    "load_studies",
    "load_study",
    "load_yaml",
    "merge",
    "model_from_dict",
    "nested",
    "parse_override",
    "resolve",
    "resolve_layers",
    "rounds",
    "stages",
    "student_config",
    "teacher_config",
    "variant_configs",
    "with_batches",
    "with_length",
]
