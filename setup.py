"""Packaging of clsd_tf. BUILD.md gives the reason for each dependency."""

import pathlib
import re

from setuptools import find_packages, setup

RUNTIME = [
    "absl-py",
    "apache-beam>=2.70",
    "click>=8.2",
    "fastavro",
    "grpcio",
    "grpcio-health-checking",
    "jinja2",
    "markupsafe",
    "matplotlib",
    "numpy",
    "prometheus-client",
    "protobuf",
    "pyarrow",
    "pydantic>=2.7",
    "pyyaml",
    "rich",
    "scikit-learn>=1.5",
    "scipy>=1.15",
    "starlette>=1.0",
    "tensorboard",
    "tensorflow>=2.21,<2.22",
    "tensorflow-datasets",
    "tensorflow-recommenders>=0.7.7",
    "tensorflow-serving-api",
    "tf-keras>=2.21,<2.22",
    "urllib3>=2",
    "uvicorn",
]
PACKAGES = ("clsd_tf", "pipelines", "feature_specs", "export", "benchmarks")
DEVELOPMENT = ["hypothesis", "mypy", "pdoc", "pytest", "pytest-xdist", "ruff", "types-pyyaml"]

HERE = pathlib.Path(__file__).parent
# Read, not imported: the Python that builds has none of the packages above.
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "clsd_tf" / "__init__.py").read_text(encoding="utf-8"))[1]

setup(
    name="clsd_tf",
    version=VERSION,
    description="CTR pipeline in TensorFlow/Keras with click-confidence learning (CLSD)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    # Tests are never installed.
    packages=find_packages(include=[f"{name}{below}" for name in PACKAGES for below in ("", ".*")]),
    package_data={"": ["*.html", "*.yaml"], "export.servable": ["profiles/*.yaml"]},
    entry_points={"console_scripts": ["clsd = clsd_tf.commands.command_line:clsd"]},
    install_requires=RUNTIME,
    extras_require={"dev": DEVELOPMENT},
)
