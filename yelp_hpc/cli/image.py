"""The commands `image build`, `image check` and `image info`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from yelp_hpc.cli.meant import Commands
from yelp_hpc.cli.options import JSON, Place
from yelp_hpc.progress import plain
from yelp_hpc.runtime import use_programs

IMAGE = click.argument("image", default="yelp_hpc.sif", type=Place(path_type=Path, dir_okay=False))
CLUSTER = click.option(
    "--cluster",
    metavar="FILE",
    type=Place(),
    expose_value=False,
    callback=lambda context, option, value: _take_up(value),
    help="a cluster file, whose `programs:` may name the container program",
)


def _take_up(cluster: str | None) -> None:
    from yelp_hpc.jobs.cluster import load_cluster

    if cluster:
        use_programs(load_cluster(cluster).programs)


@click.group(cls=Commands)
def image() -> None:
    """Build and check the Apptainer image that jobs run in.

    \b
      python -m yelp_hpc image build yelp_hpc.sif --cuda
    """


@image.command()
@IMAGE
@CLUSTER
@click.option(
    "--lock", metavar="FILE", type=Place(path_type=Path), help="default: containers/cpu.lock"
)
@click.option("--cuda", is_flag=True, help="the GPU set, containers/cuda.lock")
@click.option(
    "--base",
    default="docker",
    show_default=True,
    metavar="docker|debootstrap|FILE.sif",
    help="where the base comes from",
)
def build(image: Path, lock: Path | None, cuda: bool, base: str) -> None:
    """Build IMAGE from Apptainer.def and a lock file; the old one is kept until it is done.

    \b
    For GPUs, and where no registry is reached:
      python -m yelp_hpc image build yelp_hpc.sif --cuda
      python -m yelp_hpc image build yelp_hpc.sif --base debootstrap
    """
    from yelp_hpc.image.build import build as build_image
    from yelp_hpc.own_files import SHARE

    default = SHARE / "containers" / ("cuda.lock" if cuda else "cpu.lock")
    click.echo(f"{image} sha256:{build_image(image, lock or default, base=base)}")


@image.command()
@IMAGE
@CLUSTER
def check(image: Path) -> None:
    """Compare IMAGE with its lock, this host and its GPU driver, and run its test.

    \b
      python -m yelp_hpc image check yelp_hpc.sif
    """
    from yelp_hpc.image.check import require_sound

    require_sound(image)
    click.echo(f"{image}: sound")


@image.command()
@IMAGE
@CLUSTER
@JSON
def info(image: Path, as_json: bool) -> None:
    """Show what IMAGE is: version, commit, lock, SHA-256.

    \b
      python -m yelp_hpc image info yelp_hpc.sif --json
    """
    from yelp_hpc.image.check import info as look

    found = look(image)
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        click.echo(plain(f"{name:<12} {value}"))
