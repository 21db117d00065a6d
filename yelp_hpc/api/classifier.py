"""`Classifier`: a trained model as a Python object, from a run, a folder or the Hub."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yelp_hpc.api.source import find_source
from yelp_hpc.config import Config, Precision
from yelp_hpc.errors import RequestError, all_problems
from yelp_hpc.settings import check_values

if TYPE_CHECKING:
    from yelp_hpc.data.prompt import Prompt
    from yelp_hpc.inference.predictor import Loaded


_turn = threading.RLock()
"""One call at a time: loading a model sets what holds for every thread of a process."""


@cache
def _prepare_forks() -> None:
    """Have forks of this process compute in one thread: OpenMP waits for the others, lost there."""
    import torch

    def in_child() -> None:
        global _turn
        _turn = threading.RLock()  # another thread may have held it
        torch.set_num_threads(1)

    os.register_at_fork(after_in_child=in_child)


@dataclass(frozen=True)
class Prediction:
    """What the model answers to one text."""

    label: str | None
    """One of `task.labels`; None when the model wrote no label (generate mode alone)."""
    name: str | None
    """The label's name for people."""
    probabilities: Mapping[str, float]
    """Label → probability, in the order of the classes; empty in generate and answer mode."""
    expected: float | None = None
    """Of an ordinal task: the mean of the labels by their probabilities."""
    generated: str | None = None
    """Generate mode: what the model wrote."""

    def __repr__(self) -> str:
        said = [repr(self.label)]
        if self.name != self.label:
            said.append(f"name={self.name!r}")
        if self.label is not None and self.probabilities:
            said.append(f"probability={self.probabilities[self.label]:.3f}")
        if self.expected is not None:
            said.append(f"expected={self.expected:.2f}")
        if self.generated is not None:
            said.append(f"generated={self.generated!r}")
        return f"Prediction({', '.join(said)})"


class Classifier:
    """A trained model that answers for texts as the run's evaluation did.

    Prompt, labels, longest text, mode and precision are those of the run. Weights are loaded when
    the first text is asked, onto the GPU if there is one. Threads may share it; a copy for another
    process loads them anew.

    Args:
        source: a run directory; a Hub repository that `publish` made (`OWNER/NAME`), or a copy of
            it; a folder of `export --merged`; a run's `train/adapter`.
        model: `tuned`, or `base` for the model before training.
        base: folder or Hub id of the base model, where the recorded one is not to be found here.
        revision: branch or commit of the Hub repository.
        precision: `fp32`, `bf16` or `fp16`; None: the run's `infer.precision`.
        answers_only: the labels without their probabilities: faster where labels are many and of
            several tokens. No change to a run of `infer.mode: generate`.

    Raises:
        RequestError: `source` is none of these, its adapter is missing or damaged, the repository
            does not exist or may not be read.
        StageError: the download fails, or the adapter there is another run's.
    """

    def __init__(
        self,
        source: str | Path,
        model: str = "tuned",
        *,
        base: str | Path | None = None,
        revision: str | None = None,
        precision: Precision | None = None,
        answers_only: bool = False,
    ) -> None:
        if model not in ("base", "tuned"):
            raise RequestError(f"model is {model!r}: one of 'base', 'tuned'")
        self._source = find_source(
            source, model == "tuned", None if base is None else str(base), revision
        )
        self._model = model
        config = self._source.config
        values = config.infer.model_dump()
        if precision is not None:
            values["precision"] = precision
        if answers_only and values["mode"] == "score":
            values["mode"] = "answer"
        if values != config.infer.model_dump():
            infer = check_values(type(config.infer), values, Path("Classifier"))
            config = config.model_copy(update={"infer": infer})
        self.config: Config = config
        """The run's configuration."""

    @property
    def labels(self) -> tuple[str, ...]:
        """What it answers, in the order of the classes."""
        return self.config.task.labels

    @property
    def names(self) -> tuple[str, ...]:
        """The labels' names for people."""
        return self.config.task.shown

    def predict(self, texts: Iterable[str]) -> list[Prediction]:
        """The answer for each text, in their order.

        A text over `data.cutoff` tokens loses its end, as in training.

        Args:
            texts: `n` texts, none of them blank; a list, a pandas or an Arrow column.

        Raises:
            TypeError: `texts` is one text, a table, a dict or a set, or holds what is no text.
            RequestError: a text is blank or holds half a character, the model cannot be used (the
                message says why).
            StageError: the scores overflowed, the memory of the device is too small.
        """
        given = _checked(texts)
        if not given:
            return []
        with _turn:
            return self._answers(given)

    def _answers(self, given: list[str]) -> list[Prediction]:
        from yelp_hpc.inference.predictor import predictor_of
        from yelp_hpc.stages.prepare import tokens_of

        prompt, tokenizer, end = self._prompt
        ids, _ = prompt.fit(given)
        common = list(ids[0])
        from yelp_hpc.data.prompt import common_prefix

        prefix = prompt.prefix(common[: common_prefix([min(ids), max(ids)])], min(map(len, ids)))
        tokens = tokens_of(self.config, prompt, tokenizer, end, prefix)
        predictor = predictor_of(self._loaded, self.config, tokens)
        found: list[Prediction | None] = [None] * len(given)
        for batch in predictor.plan([len(one) for one in ids]):
            answers, scores, written = predictor.predict([ids[i] for i in batch])
            for place, i in enumerate(batch):
                found[i] = self._prediction(
                    answers[place],
                    scores[place] if scores else None,
                    written[place] if written else None,
                )
        return [one for one in found if one is not None]

    @cached_property
    def _prompt(self) -> tuple[Prompt, Any, int]:
        """The prompt, its tokenizer and the id that ends a sequence."""
        from yelp_hpc.models.load import check_tokenizer, load_tokenizer
        from yelp_hpc.models.local import model_folder
        from yelp_hpc.stages.prepare import bind_prompt

        folder = model_folder(self.config.model)
        tokenizer = load_tokenizer(folder)
        end = check_tokenizer(tokenizer, folder)
        return bind_prompt(self.config, tokenizer), tokenizer, end

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_prompt", "_loaded")}

    @cached_property
    def _loaded(self) -> Loaded:
        from yelp_hpc.inference.predictor import load
        from yelp_hpc.stages.door import take_the_way

        config = self.config

        def way(model: Any, folder: Path) -> Any:
            return take_the_way(model, config, folder, config.data.cutoff).generate

        _prepare_forks()
        return load(config, self._source.adapter, way)

    def _prediction(
        self, answer: int | None, scores: list[float] | None, generated: str | None
    ) -> Prediction:
        from yelp_hpc.evaluation.joined import expected_values
        from yelp_hpc.evaluation.metrics import softmax

        task = self.config.task
        chances: dict[str, float] = {}
        expected = None
        if scores is not None:
            import numpy as np

            chances = dict(zip(task.labels, softmax(np.array(scores)).tolist(), strict=True))
            if task.ordinal:
                pairs = zip(chances.values(), expected_values(task), strict=True)
                expected = sum(chance * value for chance, value in pairs)
        return Prediction(
            label=None if answer is None else task.labels[answer],
            name=None if answer is None else task.shown[answer],
            probabilities=chances,
            expected=expected,
            generated=generated,
        )

    def __repr__(self) -> str:
        names = list(self.names)
        shown = ", ".join(names if len(names) <= 6 else [*names[:4], "…", names[-1]])
        loaded = "loaded" if "_loaded" in self.__dict__ else "loaded when first asked"
        return (
            f"Classifier({self._source.name!r}, {self._model}: "
            f"{len(names)} labels: {shown}; {loaded})"
        )


def _checked(texts: Iterable[str]) -> list[str]:
    """The texts as a list. Raises as `Classifier.predict` does."""
    if isinstance(texts, str | bytes):
        raise TypeError("predict takes a list of texts: predict([text])[0] is the answer for one")
    if isinstance(texts, Mapping | Set) or hasattr(texts, "columns"):  # its names, or no order
        kind = type(texts).__name__
        raise TypeError(f"predict takes a list or a column of texts, not a {kind}")
    given = [one.as_py() if hasattr(one, "as_py") else one for one in texts]
    problems = []
    for place, text in enumerate(given):
        if not isinstance(text, str):
            raise TypeError(f"texts[{place}] is {text!r}, no text")
        if not text.strip():
            problems.append(f"texts[{place}] is blank")
        elif not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            problems.append(f"texts[{place}] holds half a character (a lone surrogate)")
    if problems:
        raise RequestError(all_problems("these texts cannot be asked:", problems))
    return given
