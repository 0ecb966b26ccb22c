"""Build the package from settings.ini, the one place that names versions and requirements."""

from configparser import ConfigParser
from pathlib import Path
from shutil import copyfile

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

parser = ConfigParser(delimiters=["="])
parser.read(ROOT / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
package = settings["lib_path"]

EXTRAS = ("winclip", "tensorboard", "ray", "onnx", "dev", "docs")
# The manifest lives in the repository's root, where a person edits it; the wheel carries a copy
DATA_FILES = ("backbones_manifest.json",)


class BuildWithData(build_py):
    """Copy the root's data files into the built package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name in DATA_FILES:
                copyfile(ROOT / name, Path(self.build_lib) / package / name)


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=[package, f"{package}.*"]),
    # Published numbers; the ES module and the style of the dashboards
    package_data={package: ["*.json", "*.csv"], f"{package}.widgets": ["static/*"]},
    install_requires=settings["requirements"].split(),
    extras_require={name: settings[f"{name}_requirements"].split() for name in EXTRAS},
    entry_points={
        "console_scripts": settings["console_scripts"].split("\n"),
        "nbdev": [f"{package}={package}._modidx:d"],
    },
    cmdclass={"build_py": BuildWithData},
)
