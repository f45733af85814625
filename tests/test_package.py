"""The wheel and the sdist: what is in them, and that the wheel works without optional packages."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import lissom.optim
import pytest

ROOT = Path(__file__).parent.parent
FILES = ["pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "CITATION.cff",
         "CONTRIBUTING.md", "LICENSE"]
FOLDERS = ["optim", "kernels", "bench", "docs", "tests", ".ci"]
#: What lissom works without, fewer comforts apart.
OPTIONAL = ["triton", "scipy", "transformers", "peft", "accelerate", "rich", "matplotlib",
            "bitsandbytes", "safetensors", "galore_torch", "fira"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Both archives, from a copy of the sources."""
    folder = tmp_path_factory.mktemp("release")
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name,
                        ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."],
                   cwd=folder, check=True, capture_output=True, timeout=300)
    wheel, = (folder / "dist").glob("*.whl")
    sdist, = (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def sources(*folders):
    return {str(file.relative_to(ROOT)) for folder in folders
            for file in (ROOT / folder).rglob("*.py") if "__pycache__" not in file.parts}


def test_wheel_has_the_three_packages_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as archive:
        names = archive.namelist()
        text = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    inside = {n for n in names if ".dist-info/" not in n}
    assert inside == {f"lissom/{n}" for n in sources("optim", "kernels", "bench")} | {
        f"lissom/{n}/py.typed" for n in ("optim", "kernels", "bench")}
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert f"Version: {lissom.optim.__version__}\n" in text
    needed = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra)", text, re.MULTILINE)
    assert needed == ["torch", "typing-extensions", "triton"]


def test_sdist_has_all_that_tests_need(built):
    with tarfile.open(built[1]) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert sources("optim", "kernels", "bench", "tests") <= names
    assert {*FILES, ".ci/run"} <= names
    for folder in ("docs", "bench/results"):
        assert {str(f.relative_to(ROOT)) for f in (ROOT / folder).iterdir() if f.is_file()} <= names


def test_wheel_works_without_triton_and_optional_packages(built, tmp_path):
    """They cannot be imported there; .ci/run does the same where they are not installed."""
    subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--target",
                    str(tmp_path / "site"), str(built[0])], check=True, capture_output=True)
    shutil.copy(ROOT / "tests/smoke.py", tmp_path)
    done = subprocess.run([sys.executable, "-I", "smoke.py", str(tmp_path / "site"), "--hide",
                           *OPTIONAL], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "smoke: ok" in done.stdout


def test_versions_agree():
    """pyproject takes the version from the package; the citation and the changes must follow."""
    version = lissom.optim.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()


def test_sources_of_the_readme_are_in_the_citation():
    text = (ROOT / "README.md").read_text()
    papers = set(re.findall(r"arXiv\s(\d{4}\.\d{4,5})", text[text.index("## Sources"):]))
    assert len(papers) > 12
    assert papers == set(re.findall(r"arXiv:(\d{4}\.\d{4,5})", (ROOT / "CITATION.cff").read_text()))
