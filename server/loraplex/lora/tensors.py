"""FileTensors: the tensors of a weights file that has been read into memory, as views."""

from collections.abc import Iterator

import torch

from loraplex.lora.headers import SafetensorsHeader

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class FileTensors:
    """`data` holds the whole file, writable, and is not written."""

    def __init__(self, header: SafetensorsHeader, data: memoryview):
        self._header = header
        self._data = data

    def __iter__(self) -> Iterator[str]:
        """The file's keys."""
        return iter(self._header.tensors)

    def __getitem__(self, key: str) -> torch.Tensor:
        """The tensor `key`, in the file's dtype and shape."""
        info = self._header.tensors[key]
        begin, dtype = self._header.data_start + info.offset, _DTYPES[info.dtype]
        if begin % dtype.itemsize:
            # a file may mix types, so that a float32 matrix starts between two multiples of 4
            part = bytearray(self._data[begin : begin + info.nbytes])
            return torch.frombuffer(part, dtype=dtype).view(info.shape)
        count = info.nbytes // dtype.itemsize
        return torch.frombuffer(self._data, dtype=dtype, count=count, offset=begin).view(info.shape)

    def get(self, key: str | None) -> torch.Tensor | None:
        """The tensor `key`; None for None."""
        return None if key is None else self[key]
