"""Packed documents: which tokens of a row belong to one document, in the form each layer needs.

Several documents share one row of a batch and must not affect each other. Mamba-2 resets its
convolution and state where the document id changes, attention computes each document separately,
and multi-token prediction drops the targets that lie in the next document.

Shapes: B rows (sequences), S tokens a row.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from nemotron_train.platform.device import to_device


@dataclass
class PackedDocuments(PackedSeqParams):
    """Megatron's packed-sequence parameters with document ids, one a token.

    Megatron passes this object to every layer unchanged. `qkv_format` stays "sbhd" so that none
    of Megatron's own layers flattens the rows.

    document_ids_BS: int64, non-decreasing along each row. host_ids_BS: the same in host memory,
    from which everything that decides shapes is derived; without it the ids are copied back from
    the device (SYNC).
    """

    document_ids_BS: torch.Tensor | None = None
    host_ids_BS: torch.Tensor | None = None

    @classmethod
    def of(
        cls, document_ids_BS: torch.Tensor, host_ids_BS: torch.Tensor | None = None
    ) -> "PackedDocuments":
        """Build it from document ids, int64 [B,S]."""
        return cls(qkv_format="sbhd", document_ids_BS=document_ids_BS, host_ids_BS=host_ids_BS)

    @functools.cached_property
    def _host_ids(self) -> torch.Tensor:
        return self.ids_BS.cpu() if self.host_ids_BS is None else self.host_ids_BS

    @functools.cached_property
    def ids_BS(self) -> torch.Tensor:
        """The document ids, never None."""
        assert self.document_ids_BS is not None
        return self.document_ids_BS

    @functools.cached_property
    def boundaries(self) -> bool:
        """Whether any row holds more than one document."""
        return bool((self._host_ids[:, :1] != self._host_ids[:, -1:]).any())

    @functools.cached_property
    def ids_or_none(self) -> torch.Tensor | None:
        """The ids, or None if no row has a boundary: the kernels are faster without ids."""
        return self.ids_BS if self.boundaries else None

    @functools.cached_property
    def segments(self) -> list[list[tuple[int, int]]]:
        """The (start, end) of each document, for each row."""
        rows = []
        for ids in self._host_ids.numpy():
            cuts = [0, *((ids[1:] != ids[:-1]).nonzero()[0] + 1).tolist(), len(ids)]
            rows.append(list(itertools.pairwise(cuts)))
        return rows

    @functools.cached_property
    def cumulative_lengths(self) -> torch.Tensor:
        """0 and the end of each document with all rows concatenated: int32 [documents + 1], the
        `cu_seqlens` of variable-length attention."""
        length = self.ids_BS.shape[1]
        ends = [0] + [
            row * length + end for row, parts in enumerate(self.segments) for _, end in parts
        ]
        return to_device(torch.tensor(ends, dtype=torch.int32), self.ids_BS.device)

    @functools.cached_property
    def longest(self) -> int:
        """Tokens in the longest document of the micro-batch."""
        return max(end - start for parts in self.segments for start, end in parts)
