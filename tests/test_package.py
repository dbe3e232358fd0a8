"""What gets built and installed is what is in the folders, and importing it costs nothing that is not needed."""

import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path
from shutil import copy2, copytree, ignore_patterns

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from sla_compile._compat import MINIMUM_TORCH, check_torch

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
SINGLE_MODULES = [f"{name}.py" for name in PROJECT["tool"]["setuptools"]["py-modules"]]
NOT_IMPORTED = {"triton", "tensorrt", "tensorrt_rtx", "torch_tensorrt", "onnx", "onnxscript", "onnxruntime"}
NOT_IMPORTED |= {"diffusers", "transformers", "accelerate", "peft", "matplotlib"}


def folder_of(package):
    inside = PROJECT["tool"]["setuptools"]["package-dir"].get(package)
    return ROOT / (inside or package.replace(".", "/"))


def modules_on_disk():
    """The wheel's path of every Python file of the library."""
    found = {name: ROOT / name for name in SINGLE_MODULES}
    for top in ("sla_compile", "kernels", "passes"):
        for path in (ROOT / top).rglob("*.py"):
            inside = path.relative_to(ROOT).as_posix()
            found[inside if top == "sla_compile" else f"sla_compile/{inside}"] = path
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with a wheel, a wheel made from the sdist, and an editable wheel, all from a copy of the checkout."""
    checkout, output = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("built")
    for path in ROOT.iterdir():
        if path.is_dir() and path.name in (
            "sla_compile",
            "kernels",
            "passes",
            "tests",
            "examples",
            "docs",
            "benchmarks",
        ):
            copytree(path, checkout / path.name, ignore=ignore_patterns("__pycache__"))
        elif path.is_file():
            copy2(path, checkout)
    program = """
import os, sys, tarfile
from setuptools import build_meta
checkout, output = sys.argv[1:]
build_meta.build_wheel(output + "/wheel")
build_meta.build_editable(output + "/editable")
sdist = build_meta.build_sdist(output)
tarfile.open(output + "/" + sdist).extractall(output, filter="data")
os.chdir(output + "/" + sdist.removesuffix(".tar.gz"))
build_meta.build_wheel(output + "/from_sdist")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, checkout, output], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return checkout, output


def unpacked(built, name, to):
    (wheel,) = (built[1] / name).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(to)
        return archive.namelist()


def run_python(program, *paths):
    """Runs a program in a fresh interpreter that sees torch and these folders, but no installed sla_compile."""
    packages = Path(torch.__file__).parent.parent
    # -I and -S leave out the current folder and the .pth files of site-packages, through which editable installs work.
    prelude = "".join(f"site.addsitedir({str(path)!r})\n" for path in paths)
    prelude = f"import site, sys\n{prelude}sys.path.append({str(packages)!r})\n"
    done = subprocess.run([sys.executable, "-ISW", "error", "-c", prelude + program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_package_list_is_the_folders():
    with_modules = {path.parent for path in modules_on_disk().values()} - {ROOT}
    assert {folder_of(package) for package in PACKAGES} == with_modules


def test_top_level_folders_are_no_packages_of_their_own():
    # An __init__.py would make them shadow Hugging Face's `kernels`, which diffusers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "passes" / "__init__.py").exists()


@pytest.mark.parametrize("name", ["wheel", "from_sdist"])
def test_wheel_contents(built, name, tmp_path):
    names = unpacked(built, name, tmp_path)
    modules = modules_on_disk()
    assert {entry for entry in names if entry.endswith(".py")} == set(modules)
    others = {entry.split("/", 1)[1] for entry in names if not entry.endswith(".py")}
    assert others == {
        "kernels/cpu_matrix.h",
        "kernels/cpu_native.c",
        "kernels/cpu_native_bfloat16.c",
        "py.typed",
        "METADATA",
        "WHEEL",
        "RECORD",
        "entry_points.txt",
        "top_level.txt",
        "licenses/LICENSE",
    }
    for entry, path in modules.items():
        assert (tmp_path / entry).read_bytes() == path.read_bytes()


def test_sdist_holds_what_its_tests_need(built):
    (folder,) = (path for path in built[1].glob("sla_compile-*") if path.is_dir())
    for name in (
        "constraints.txt",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "tests/conftest.py",
        "examples/fine_tune.py",
    ):
        assert (folder / name).is_file(), name


@pytest.mark.parametrize("way", ["wheel", "editable", "checkout"])
def test_fresh_import_is_light_and_finds_its_parts(built, way, tmp_path):
    if way == "checkout":
        source = where = built[0]
    else:
        unpacked(built, way, tmp_path)
        source, where = tmp_path, tmp_path if way == "wheel" else built[0]
    program = f"""
import sla_compile, sla_compile.kernels.spec, sla_compile.passes.sites
assert sla_compile.__file__ == {str(where / "sla_compile" / "__init__.py")!r}, sla_compile.__file__
print(sla_compile.kernels.spec.__file__, sla_compile.passes.sites.__file__)
loaded = {NOT_IMPORTED!r} & set(sys.modules)
assert not loaded, loaded
"""
    inside = where / "sla_compile" if way == "wheel" else where
    assert run_python(program, source).split() == [f"{inside}/kernels/spec.py", f"{inside}/passes/sites.py"]


def test_checkout_does_not_shadow_a_package_named_kernels(built, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("someone_elses = True\n")
    program = "import sla_compile, kernels, sla_compile.kernels.spec\nassert kernels.someone_elses\n"
    run_python(program, built[0], tmp_path)


def test_entry_points_exist():
    points = [*PROJECT["project"]["scripts"].values()]
    points += PROJECT["project"]["entry-points"]["torch_dynamo_backends"].values()
    for point in points:
        module, _, name = point.partition(":")
        assert callable(getattr(import_module(module), name)), point


@pytest.mark.parametrize(
    "version", ["2.11.0", "2.11.0a0+git1234567", "2.12.1+cu130", "2.13.0+cpu", "2.15.0.dev20261101"]
)
def test_supported_torch(version):
    check_torch(version)


@pytest.mark.parametrize("version", ["2.10.1", "2.9.0+cpu", "1.13.1"])
def test_torch_that_is_too_old_is_refused_at_import(version, built):
    with pytest.raises(ImportError, match=r'needs torch 2\.11 or newer.*pip install "torch>=2\.11"') as error:
        check_torch(version)
    assert version in str(error.value)
    program = f"""
import torch
torch.__version__ = {version!r}
try:
    import sla_compile
except ImportError as error:
    assert "needs torch 2.11 or newer, found torch {version}" in str(error), error
else:
    raise AssertionError("imported")
"""
    run_python(program, built[0])


def test_versions_agree():
    requirements = {r.name: r for r in map(Requirement, PROJECT["project"]["dependencies"])}
    assert f">={MINIMUM_TORCH}" in str(requirements["torch"].specifier)
    assert "triton" not in requirements
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {PROJECT['project']['version']}" in changelog


def test_constraints_satisfy_the_requirements():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"]
    for text in PROJECT["project"]["dependencies"] + extras["demo"] + extras["test"] + extras["dev"]:
        requirement = Requirement(text)
        if requirement.name != "sla-compile":
            version = pinned[requirement.name.lower().replace("_", "-")]
            assert requirement.specifier.contains(Version(version)), f"{text}, but constraints.txt has {version}"
