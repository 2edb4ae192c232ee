"""A network as a file of another runtime, and such a file as a function.

============  ===========  =============================================================
format        file         what it is
============  ===========  =============================================================
onnx          .onnx        ONNX, weights inside
program       .pt2         a program of torch.export
torchscript   .ts          a trace
int8          .int8.onnx   the ONNX file, the matrices of its encoder in eight bits
============  ===========  =============================================================

All take a batch of any size, and none holds a path of the machine that wrote it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMATS = {"onnx": ".onnx", "program": ".pt2", "torchscript": ".ts", "int8": ".int8.onnx"}
OPSET = 23
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_ONNX = 2**31  # bytes that its encoding can hold
ABOUT = "about.json"  # the metadata's entry in .pt2 and .ts
Run = Callable[[Tensor], tuple[Tensor, ...]]


def need_packages(formats: Sequence[str]) -> None:
    """Whether these formats can be written here.

    Raises:
        ValueError: naming the packages that are missing, and how to install them.
    """
    if not {"onnx", "int8"} & set(formats):
        return
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"exporting to ONNX needs {', '.join(missing)}: pip install 'discovr-monai[export]'"
        )


def encode(
    network: nn.Module,
    shape: Sequence[int],
    outputs: Sequence[str],
    about: Mapping[str, Any],
    formats: Sequence[str],
) -> Iterator[tuple[str, bytes]]:
    """A network in some formats.

    Args:
        network: (B, *shape) float32 -> a tensor, or a tuple of them. What lies outside its
            module ``encoder`` is not quantised.
        shape: of the input, without batch.
        outputs: their names.
        about: the metadata.
        formats: keys of FORMATS.

    Returns:
        (format, the file's bytes), one after the other.

    Raises:
        ValueError: if the weights do not fit into an ONNX file.
    """
    program: Any = None
    graph: Any = None
    if set(formats) & {"onnx", "int8"}:
        _check_size(network)
    if set(formats) - {"torchscript"}:
        program = _program(network, shape)
    if set(formats) & {"onnx", "int8"}:
        graph = _graph(program, outputs)
    for name in formats:
        if name == "program":
            content = io.BytesIO()
            torch.export.save(program, content, extra_files={ABOUT: json.dumps(about)})
            yield name, content.getvalue()
        elif name == "torchscript":
            yield name, _trace(network, shape, about)
        elif name == "onnx":
            yield name, _with_metadata(graph, about)
        else:
            outside = {key for key in network.state_dict() if not key.startswith("encoder.")}
            yield name, _with_metadata(_int8(graph, outside), about)


def open_exported(file: str | Path, kind: str, threads: int | None = None) -> Run:
    """A function from the input to the outputs of a file that :func:`encode` made.

    Args:
        file: one of ours; a file of another origin may run any code.
        kind: a key of FORMATS.
        threads: of ONNX Runtime; None: as many as torch has.
    """
    if kind in ("onnx", "int8"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(str(file), options, providers=providers)
        name = session.get_inputs()[0].name
        return lambda clip: tuple(map(torch.from_numpy, session.run(None, {name: clip.numpy()})))
    with Path(file).open("rb") as content, _quiet():
        if kind == "program":
            network: Any = torch.export.load(content).module()
        else:
            network = torch.jit.load(content, map_location="cpu")

    def run(clip: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            outputs = network(clip)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return run


# ---- programs and ONNX -------------------------------------------------------------------


def _program(network: nn.Module, shape: Sequence[int]) -> Any:
    """A torch.export program."""
    example = torch.zeros(2, *shape)
    batch = torch.export.Dim("batch", min=1)
    with _quiet():
        program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of this machine
    program._example_inputs = None  # type: ignore[assignment]  # would lie in the file
    return program


def _check_size(network: nn.Module) -> None:
    size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    if size >= LARGEST_ONNX:
        raise ValueError(
            f"{size / 2**30:.1f} GiB of weights do not fit into one ONNX file, which holds less "
            "than 2: use --format program"
        )


def _graph(program: Any, outputs: Sequence[str]) -> Any:
    """The program as an ONNX model."""
    with _quiet():
        model: Any = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=["clip"],
            output_names=list(outputs),
            verbose=False,
        )
    model = model.model_proto
    graph = model.graph
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == symbol:
                dim.dim_param = "batch"
    for place in (graph, *graph.node, *graph.value_info):
        del place.metadata_props[:]  # names files of this machine
    return model


def _int8(model: Any, outside: set[str]) -> Any:
    """Dynamic quantisation: weights once, activations as they come.

    The tensors ``outside`` the encoder stay as they are. Weights use seven of the eight bits:
    with all of them, CPUs without VNNI overflow, and a file would compute another thing there
    than where it was checked.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    heads = [node.name for node in model.graph.node if set(node.input) & outside]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        file = Path(folder) / "int8.onnx"
        quantize_dynamic(
            copy.deepcopy(model),
            file,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=heads,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        return onnx.load(file)


def _with_metadata(model: Any, about: Mapping[str, Any]) -> bytes:
    """The file: an entry for each of ``about``, as JSON unless it is text."""
    import onnx

    entries = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
    onnx.helper.set_model_props(model, entries)
    content: bytes = model.SerializeToString()
    return content


# ---- TorchScript -------------------------------------------------------------------------


class SameShape(nn.Module):
    """A trace that refuses inputs of another shape; alone it would reshape some in silence."""

    def __init__(self, trace: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.trace, self.shape = trace, list(shape)

    def forward(self, clip: Tensor):
        """As the network; the script infers what it returns."""
        assert clip.shape[1:] == self.shape, f"a clip must be (B, 3, T, H, W) with {self.shape}"
        return self.trace(clip)


def _trace(network: nn.Module, shape: Sequence[int], about: Mapping[str, Any]) -> bytes:
    whole, kept = io.BytesIO(), io.BytesIO()
    with _quiet():
        trace = torch.jit.trace(network, torch.zeros(2, *shape), check_trace=False)
        script = torch.jit.script(SameShape(trace, shape))
        torch.jit.save(script, whole, _extra_files={ABOUT: json.dumps(about)})
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(kept, "w") as target:
        for entry in source.infolist():
            if not entry.filename.endswith(".debug_pkl"):  # names files of this machine
                target.writestr(entry, source.read(entry))
    return kept.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of themselves: deprecations, operators of torchvision."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
