"""The network, and the excerpts of text that it is trained and evaluated on."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tamegrad.study.settings import BATCH, LENGTH, VOCABULARY
from tamegrad.study.text import Text

__all__ = ["ByteNetwork", "batches", "held_out_batch", "make_network"]

EMBEDDING = 64
HIDDEN = 128
STACKED = 2
HELD_OUT_EXCERPTS = 64


class ByteNetwork(nn.Module):
    """Predicts each byte from those before it: embedding, two stacked recurrent layers, linear.

    Args:
        kind: `"rnn"` or `"lstm"`.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, EMBEDDING)
        self.rnn: nn.RNN | nn.LSTM
        if kind == "lstm":
            self.rnn = nn.LSTM(EMBEDDING, HIDDEN, STACKED, batch_first=True)
        else:
            self.rnn = nn.RNN(EMBEDDING, HIDDEN, STACKED, nonlinearity="relu", batch_first=True)
            # The usual initialization of a ReLU RNN: the hidden state neither decays nor grows along the sequence.
            for layer in range(STACKED):
                nn.init.orthogonal_(getattr(self.rnn, f"weight_hh_l{layer}"))
        self.out = nn.Linear(HIDDEN, VOCABULARY)

    def loss(self, excerpts: Tensor) -> Tensor:
        """Returns the mean cross-entropy of predicting each next byte.

        Args:
            excerpts: `(excerpts, LENGTH + 1)` bytes.

        Returns:
            Nats per byte, 0-dim.
        """
        hidden, _ = self.rnn(self.embedding(excerpts[:, :-1]))
        return nn.functional.cross_entropy(self.out(hidden).flatten(0, 1), excerpts[:, 1:].flatten())


def make_network(kind: str, seed: int) -> ByteNetwork:
    """Returns a new network; the same seed gives the same parameters.

    Args:
        kind: `"rnn"` or `"lstm"`.
        seed: Seeds the initial parameters.

    Returns:
        The network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ByteNetwork(kind)


def batches(text: Text, seed: int) -> Iterator[Tensor]:
    """Yields training batches without end; the same seed gives the same batches.

    Args:
        text: The text; its held-out part is never used.
        seed: Seeds the choice of excerpts.

    Yields:
        `(BATCH, LENGTH + 1)` bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    data = _numbers(text.data[: text.held_out_from])
    places = torch.arange(LENGTH + 1)
    while True:
        starts = torch.randint(len(data) - LENGTH, (BATCH, 1), generator=generator)
        yield data[starts + places]


def held_out_batch(text: Text) -> Tensor:
    """Returns the held-out excerpts that every run is evaluated on, evenly spaced.

    Args:
        text: The text.

    Returns:
        `(excerpts, LENGTH + 1)` bytes.
    """
    data = _numbers(text.data[text.held_out_from :])
    starts = torch.linspace(0, len(data) - LENGTH - 1, HELD_OUT_EXCERPTS).long()
    return data[starts[:, None] + torch.arange(LENGTH + 1)]


def _numbers(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
