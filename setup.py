"""Everything here comes from settings.ini; edit that file, not this one."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

OF_PAGES = ".ipynb", ".png", ".jpg", ".gif", ".json", ".safetensors"  # as in medsketch/studio/app.py
suffix = "_requirements"
extras = {k.removesuffix(suffix): v.split() for k, v in cfg.items() if k.endswith(suffix)}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["medsketch", "medsketch.*"]),
    package_data={"medsketch": ["weights/*"]},
    data_files=[
        (f"share/medsketch/{folder.relative_to(here)}", [str(p.relative_to(here)) for p in files])
        for folder in [here / "nbs", *sorted(p for p in (here / "nbs").rglob("*") if p.is_dir())]
        if ".ipynb_checkpoints" not in folder.parts
        and (files := sorted(p for p in folder.iterdir() if p.suffix in OF_PAGES))
    ],
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
