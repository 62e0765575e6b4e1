"Build glue: everything about the package stands in settings.ini; notebooks and data travel inside it."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    python_requires=">=" + cfg["min_python"],
    packages=[*find_packages(include=["polm_lab", "polm_lab.*"]), "polm_lab._nbs", "polm_lab._data"],
    package_dir={"polm_lab._nbs": "nbs", "polm_lab._data": "data"},
    package_data={"polm_lab._nbs": ["**/*.ipynb", "_app/**/*"], "polm_lab._data": ["**/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in ("trl", "lab", "sweep", "dev")},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
