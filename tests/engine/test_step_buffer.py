"""StepBuffer: what is written on the host is what the device reads after `send`, always at the same addresses."""

import numpy as np
import pytest
import torch

from loraplex.engine.step_buffer import StepBuffer

CPU = torch.device("cpu")
FIELDS = {
    "ids": (torch.int64, (5,)),
    "scales": (torch.float32, (3,)),
    "tables": (torch.int32, (4, 2)),
}


def test_on_a_cpu_host_and_device_are_the_same_memory():
    buffer = StepBuffer(FIELDS, CPU)
    before = buffer.arrays
    buffer.begin()
    assert buffer.arrays is before
    buffer.arrays["tables"][:] = np.arange(8).reshape(4, 2)
    assert buffer.tensors["tables"].flatten().tolist() == list(range(8))
    buffer.send(0)
    assert buffer.tensors["tables"].data_ptr() == buffer.arrays["tables"].ctypes.data


@pytest.mark.parametrize("is_apart", [False, True])
def test_shapes_dtypes_and_places(is_apart: bool):
    buffer = StepBuffer(FIELDS, CPU, is_apart)
    for name, (dtype, shape) in FIELDS.items():
        tensor, array = buffer.tensors[name], buffer.arrays[name]
        assert (tensor.dtype, tuple(tensor.shape), array.shape) == (dtype, shape, shape)
        assert torch.from_numpy(array).dtype == dtype
        assert not tensor.any()
    for one in buffer.arrays.values():
        assert sum(np.shares_memory(one, other) for other in buffer.arrays.values()) == 1


def test_apart_the_next_step_is_written_while_this_one_is_read():
    buffer = StepBuffer(FIELDS, CPU, is_apart=True)
    places = {name: tensor.data_ptr() for name, tensor in buffer.tensors.items()}
    written = []
    for step in range(1, 5):
        buffer.begin()
        written.append(buffer.arrays["ids"].ctypes.data)
        for array in buffer.arrays.values():
            array[...] = step
        assert set(buffer.tensors["ids"].tolist()) == {step - 1}, "not before it is sent"
        buffer.send(4)
        for tensor in buffer.tensors.values():
            assert (tensor == step).all()
    assert written[0] == written[2] != written[1] == written[3]
    assert {name: tensor.data_ptr() for name, tensor in buffer.tensors.items()} == places


def test_of_the_last_field_no_more_is_sent_than_was_asked_for():
    buffer = StepBuffer(FIELDS, CPU, is_apart=True)
    buffer.begin()
    for array in buffer.arrays.values():
        array[...] = 7
    buffer.send(1)
    assert buffer.tensors["tables"].tolist() == [[7, 7], [0, 0], [0, 0], [0, 0]]
    assert (buffer.tensors["ids"] == 7).all()
    assert (buffer.tensors["scales"] == 7).all()
