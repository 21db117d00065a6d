"""What was meant by a command or an option that is not there: the next command to type."""

from __future__ import annotations

from yelp_hpc.rundir.paths import STAGES
from yelp_hpc.synonyms import COMMANDS, key_of


def command_meant(word: str) -> str | None:
    """The message for a word that is no command, None when nothing like it is known."""
    if word in STAGES:
        return (
            f"there is no command {word}; it is a stage: "
            f"`python -m yelp_hpc submit {word} --config FILE --run DIR`, or in this process "
            f"`python -m yelp_hpc run {word} --run DIR`"
        )
    meant = COMMANDS.get(word.lower().replace("_", "-"))
    return (
        f"there is no command {word}; did you mean `python -m yelp_hpc {meant}`?" if meant else None
    )


def option_meant(option: str) -> str | None:
    """The message for an option that is a key of the configuration, None when it is none."""
    from yelp_hpc.config import Config
    from yelp_hpc.settings import dotted_keys

    name = option.lstrip("-").lower().replace("-", "_")
    keys = list(dotted_keys(Config))
    same = [key for key in keys if name in (key, key.rpartition(".")[2])]
    meant = next(iter(same), None) or key_of(name)
    if meant is None:
        return None
    return f"there is no option {option}; it is a key of the config: --set {meant}=VALUE"
