"""Build shim. Every value comes from settings.ini; edit there, not here."""

import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

here = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def words(key):
    "Split as a shell does, so that a requirement with a marker can be quoted."
    return shlex.split(cfg.get(key, ""))


lib = cfg["lib_path"]
notebooks = f"{lib}.notebooks"  # the table notebooks travel in the wheel; nbs/tables is their one copy
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    python_requires=">=" + cfg["min_python"],
    packages=find_namespace_packages(include=[lib, lib + ".*"]) + [notebooks],
    package_dir={notebooks: "nbs/tables"},
    package_data={lib: ["py.typed", "*/templates/*.j2"], notebooks: ["*.ipynb"]},
    install_requires=words("requirements"),
    extras_require={k.removesuffix("_requirements"): words(k) for k in cfg if k.endswith("_requirements")},
    entry_points={"console_scripts": words("console_scripts"), "nbdev": [f"{lib}={lib}._modidx:d"]},
    zip_safe=False,
)
