"""One row that is being continued: sampling, stopping, and text as it becomes certain."""

from __future__ import annotations

import dataclasses

import numpy as np

from uncurl_jax.data.vocabulary import Vocabulary

STOP, LENGTH = "stop", "length"
# What a decoder writes for bytes that are not yet a whole character.
_INCOMPLETE = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a row is continued.

    Attributes:
      max_tokens: at most so many are made.
      temperature: 0 takes the most likely token, else the softmax of logits / temperature is
        sampled.
      seed: of the samples, with the row's number; the same row and seed give the same tokens,
        whatever else is in the batch.
      stop: texts that end the row and are not returned.
    """

    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


class Continuation:
    """A prompt and what has been made of it so far.

    Attributes:
      prompt: [p] ids, with what every row begins with.
      generated: ids made so far; an end of text is not among them.
      finish_reason: None while it runs, "stop" after an end of text or a stop text, "length" after
        max_tokens.
    """

    def __init__(
        self, prompt: list[int], sampling: Sampling, vocabulary: Vocabulary, number: int = 0
    ):
        """Begins a row, the `number`-th of its request."""
        self.prompt = prompt
        self.generated: list[int] = []
        self.finish_reason: str | None = None
        self._sampling = sampling
        self._vocabulary = vocabulary
        self._random = np.random.default_rng([sampling.seed, number])
        self._stopped_text: str | None = None
        self._is_ended = False

    @property
    def read_ids(self) -> list[int]:
        """The ids that the model reads: all but the last, unless an end of text came after it."""
        ids = [*self.prompt, *self.generated]
        return ids if self._is_ended or not self.generated else ids[:-1]

    @property
    def text(self) -> str:
        """The continuation, up to the stop text that ended it."""
        if self._stopped_text is not None:
            return self._stopped_text
        return self._vocabulary.decode(self.generated)

    @property
    def certain_text(self) -> str:
        """What of the text cannot change any more, as far as one can tell."""
        text = self.text
        if self.finish_reason is not None:
            return text
        # Whole characters only, and nothing that a stop text may have begun with.
        text = text.rstrip(_INCOMPLETE)
        longest = max((_overlap(text, stop) for stop in self._sampling.stop), default=0)
        return text[: len(text) - longest]

    def choose(self, logits: np.ndarray) -> int:
        """Takes the next token, from logits [vocab], and says which.

        Raises:
          RuntimeError: If the logits are not finite.
        """
        if not np.isfinite(logits).all():
            raise RuntimeError("Logits must be finite, got NaN or infinity from the model.")
        temperature = self._sampling.temperature
        if temperature == 0:
            token = int(logits.argmax())
        else:
            # The largest of logits plus Gumbel noise is a sample of their softmax.
            noise = self._random.gumbel(size=logits.shape)
            token = int((logits.astype(np.float64) / temperature + noise).argmax())
        if token == self._vocabulary.eos_id:
            self.finish_reason = STOP
            self._is_ended = True
            return token
        self.generated.append(token)
        self._look_for_stop()
        if self.finish_reason is None and len(self.generated) == self._sampling.max_tokens:
            self.finish_reason = LENGTH
        return token

    def _look_for_stop(self) -> None:
        if not self._sampling.stop:
            return
        text = self._vocabulary.decode(self.generated)
        places = [place for stop in self._sampling.stop if (place := text.find(stop)) >= 0]
        if places:
            self.finish_reason = STOP
            self._stopped_text = text[: min(places)]


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of `text` may begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
