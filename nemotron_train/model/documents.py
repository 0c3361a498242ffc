"""Packed documents: which tokens of a row belong together, in the form every layer needs.

Several documents share one row of a batch; none may see another. Mamba-2 resets its
convolution and state where the document id changes, attention works document by document, and
multi-token prediction drops the targets that lie in the next document.

Shapes: B rows (sequences), S tokens a row.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class PackedDocuments(PackedSeqParams):
    """Megatron's packed-sequence parameters, carrying document ids in the row layout.

    Megatron hands this object to every layer untouched; `qkv_format` stays "sbhd" so that none
    of its own layers flattens the rows.

    document_ids_BS: int64, non-decreasing along each row.
    """

    document_ids_BS: torch.Tensor | None = None

    @classmethod
    def of(cls, document_ids_BS: torch.Tensor) -> "PackedDocuments":
        return cls(qkv_format="sbhd", document_ids_BS=document_ids_BS)

    @functools.cached_property
    def ids_BS(self) -> torch.Tensor:
        assert self.document_ids_BS is not None
        return self.document_ids_BS

    @functools.cached_property
    def boundaries(self) -> bool:
        """Whether any row holds more than one document. SYNC on a GPU, once a micro-batch."""
        return bool((self.ids_BS[:, :1] != self.ids_BS[:, -1:]).any())

    @functools.cached_property
    def ids_or_none(self) -> torch.Tensor | None:
        """The ids where they matter: kernels take a shorter way when no row has a boundary."""
        return self.ids_BS if self.boundaries else None

    @functools.cached_property
    def segments(self) -> list[list[tuple[int, int]]]:
        """For each row the (start, end) of its documents. SYNC on a GPU, once a micro-batch."""
        rows = []
        for ids in self.ids_BS.cpu().numpy():
            cuts = [0, *((ids[1:] != ids[:-1]).nonzero()[0] + 1).tolist(), len(ids)]
            rows.append(list(itertools.pairwise(cuts)))
        return rows

    @functools.cached_property
    def cumulative_lengths(self) -> torch.Tensor:
        """int32 [documents + 1]: ends of all documents with the rows laid end to end."""
        length = self.ids_BS.shape[1]
        ends = [0] + [
            row * length + end for row, parts in enumerate(self.segments) for _, end in parts
        ]
        return torch.tensor(ends, dtype=torch.int32, device=self.ids_BS.device)

    @functools.cached_property
    def longest(self) -> int:
        """Tokens in the longest document of the micro-batch."""
        return max(end - start for parts in self.segments for start, end in parts)
