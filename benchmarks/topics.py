"""A real task of twenty labels: sentences and the topic that they were written for, as a csv.

The sentences are those of the package chatterbot-corpus (BSD), from PyPI, checked against its hash.

    python -m benchmarks.topics topics.csv
"""

from __future__ import annotations

import csv
import sys
import tempfile
import zipfile
from pathlib import Path

import yaml

from yelp_hpc.data.demo import download

FOLDER = "chatterbot_corpus/data/english/"
LEFT_OUT = ("health",)  # nine sentences
MOST = 60
"""Sentences of a topic; a few topics have hundreds."""


def write_topics(path: Path) -> tuple[str, ...]:
    """Write the columns `topic` and `sentence`; the topics in the order of their names."""
    with tempfile.TemporaryDirectory() as scratch:
        archive = zipfile.ZipFile(download("chatterbot-corpus", Path(scratch)))
        files = {name: archive.read(name) for name in sorted(archive.namelist())}
    rows: dict[str, list[str]] = {}
    for name, content in files.items():
        topic = Path(name).stem
        if name.startswith(FOLDER) and name.endswith(".yml") and topic not in LEFT_OUT:
            said = [line for pair in yaml.safe_load(content)["conversations"] for line in pair]
            rows[topic] = list(dict.fromkeys(str(line) for line in said if str(line).strip()))[
                :MOST
            ]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["topic", "sentence"])
        writer.writerows((topic, line) for topic, lines in rows.items() for line in lines)
    return tuple(rows)


if __name__ == "__main__":
    topics = write_topics(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: {len(topics)} topics ({', '.join(topics)})")
