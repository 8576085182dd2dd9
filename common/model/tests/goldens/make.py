"""Makes the golden models of this folder: `<case>.onnx` with random weights, and `<case>.json` with
`{"inputs": {name: {"shape", "data"}}, "outputs": {name: {"shape", "data"}}}` as ONNX Runtime computes them.

Run: `python make.py` (numpy, onnx, onnxruntime). The seed is fixed, so the models come out the same;
outputs may differ in the last digits between versions of ONNX Runtime.
"""

import json
import pathlib

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

HERE = pathlib.Path(__file__).parent
RNG = np.random.default_rng(20240614)


def rand(*shape):
    return RNG.standard_normal(shape).astype(np.float32).round(3)


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs, outputs, name=f"{op.lower()}_{outputs[0]}", **attributes)


def case(name, nodes, weights, inputs, outputs=("y",), opset=17):
    """Writes one model and its golden. `inputs`: name -> array."""
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results = session.run(list(outputs), inputs)
    # Shapes of the outputs, now known, belong in the model.
    for value, result in zip(model.graph.output, results):
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, result.shape))
    onnx.checker.check_model(model, full_check=True)
    (HERE / f"{name}.onnx").write_bytes(model.SerializeToString())
    golden = {
        "inputs": {n: dump(a) for n, a in inputs.items()},
        "outputs": {n: dump(a) for n, a in zip(outputs, results)},
    }
    (HERE / f"{name}.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


def dump(array):
    return {"shape": list(array.shape), "data": [float(f"{v:.7g}") for v in array.ravel().tolist()]}


def conv(name, x, w, bias=True, op="Conv", rows=None, **attributes):
    weights = {"w": w}
    if bias:
        weights["b"] = rand(rows or w.shape[0])
    case(name, [node(op, ["x", *weights], ["y"], **attributes)], weights, {"x": x})


def convolutions():
    conv("conv1d", rand(2, 3, 9), rand(4, 3, 3), pads=[2, 1], strides=[2])
    conv("conv2d", rand(2, 3, 6, 5), rand(4, 3, 3, 2), pads=[1, 0, 2, 1], strides=[2, 1])
    conv("conv2d_no_bias_1x1", rand(1, 5, 3, 4), rand(3, 5, 1, 1), bias=False)
    conv("conv2d_dilated", rand(1, 2, 9, 8), rand(3, 2, 3, 3), dilations=[2, 3], pads=[1, 3, 2, 2])
    conv("conv2d_grouped", rand(2, 4, 5, 5), rand(6, 2, 3, 3), group=2, strides=[2, 2], pads=[1, 1, 1, 1])
    conv("conv2d_depthwise", rand(1, 4, 5, 4), rand(8, 1, 3, 3), group=4, pads=[1, 1, 1, 1])
    conv("conv2d_same_upper", rand(1, 2, 6, 7), rand(3, 2, 3, 4), auto_pad="SAME_UPPER", strides=[2, 3])
    conv("conv2d_same_lower", rand(1, 2, 6, 7), rand(3, 2, 2, 4), auto_pad="SAME_LOWER", strides=[1, 2])
    conv("conv2d_valid", rand(1, 2, 6, 7), rand(3, 2, 3, 3), auto_pad="VALID", strides=[2, 2])
    conv("conv3d", rand(1, 2, 4, 5, 4), rand(3, 2, 2, 3, 2), pads=[1, 0, 1, 0, 1, 0], strides=[1, 2, 1])
    transpose = {"op": "ConvTranspose"}
    conv("conv_transpose1d", rand(2, 3, 5), rand(3, 4, 4), rows=4, strides=[2], pads=[1, 0], **transpose)
    conv(
        "conv_transpose2d_grouped", rand(2, 4, 3, 4), rand(4, 3, 3, 2), rows=6, group=2, strides=[2, 3],
        pads=[1, 0, 0, 1], output_padding=[1, 2], dilations=[2, 1], **transpose,
    )
    conv("conv_transpose2d_same", rand(1, 2, 3, 4), rand(2, 3, 3, 4), rows=3, strides=[2, 3],
         auto_pad="SAME_UPPER", **transpose)
    conv("conv_transpose2d_same_lower", rand(1, 2, 3, 4), rand(2, 3, 4, 4), rows=3, strides=[1, 1],
         auto_pad="SAME_LOWER", **transpose)
    conv("conv_transpose3d", rand(1, 2, 2, 3, 2), rand(2, 3, 2, 2, 3), bias=False, strides=[2, 1, 2], **transpose)


def products():
    gemm = {"alpha": 0.5, "beta": 2.0}
    case("gemm", [node("Gemm", ["x", "w", "b"], ["y"])], {"w": rand(6, 4), "b": rand(4)}, {"x": rand(3, 6)})
    case("gemm_alpha_beta_trans_b", [node("Gemm", ["x", "w", "b"], ["y"], transB=1, **gemm)],
         {"w": rand(4, 6), "b": rand(1, 4)}, {"x": rand(3, 6)})
    case("gemm_trans_a", [node("Gemm", ["x", "w"], ["y"], transA=1, alpha=-1.5)], {"w": rand(6, 4)}, {"x": rand(6, 3)})
    case("gemm_constant_left", [node("Gemm", ["w", "x", "b"], ["y"], **gemm)],
         {"w": rand(4, 6), "b": rand(4, 1)}, {"x": rand(6, 3)})
    case("gemm_constant_left_trans_a_trans_b", [node("Gemm", ["w", "x"], ["y"], transA=1, transB=1)],
         {"w": rand(6, 4)}, {"x": rand(3, 6)})
    case("matmul_right", [node("MatMul", ["x", "w"], ["y"])], {"w": rand(5, 4)}, {"x": rand(2, 3, 2, 5)})
    case("matmul_right_vector", [node("MatMul", ["x", "w"], ["y"])], {"w": rand(5, 4)}, {"x": rand(5)})
    case("matmul_left", [node("MatMul", ["w", "x"], ["y"])], {"w": rand(4, 5)}, {"x": rand(2, 3, 5, 6)})
    case("matmul_add", [node("MatMul", ["x", "w"], ["m"]), node("Add", ["b", "m"], ["y"])],
         {"w": rand(5, 4), "b": rand(4)}, {"x": rand(2, 3, 5)})


def activations():
    """Every activation behind a 1x1 Conv of 3 channels; the layer's output is `c`, the activation's `y`."""
    scalar = lambda v: np.float32(v)
    cases = {
        "relu": ([node("Relu", ["c"], ["y"])], {}, 17),
        "relu6_clip": ([node("Clip", ["c", "lo", "hi"], ["y"])], {"lo": scalar(0), "hi": scalar(6)}, 17),
        "clip_max_only": ([node("Clip", ["c", "", "hi"], ["y"])], {"hi": scalar(0.5)}, 17),
        "leaky_relu": ([node("LeakyRelu", ["c"], ["y"], alpha=0.2)], {}, 17),
        "prelu": ([node("PRelu", ["c", "s"], ["y"])], {"s": rand(3, 1, 1)}, 17),
        "prelu_scalar": ([node("PRelu", ["c", "s"], ["y"])], {"s": rand(1)}, 17),
        "sigmoid": ([node("Sigmoid", ["c"], ["y"])], {}, 17),
        "tanh": ([node("Tanh", ["c"], ["y"])], {}, 17),
        "silu": ([node("Sigmoid", ["c"], ["s"]), node("Mul", ["s", "c"], ["y"])], {}, 17),
        "hard_swish": ([node("HardSwish", ["c"], ["y"])], {}, 17),
        "hard_swish_sigmoid": (
            [node("HardSigmoid", ["c"], ["s"], alpha=1 / 6), node("Mul", ["c", "s"], ["y"])], {}, 17),
        "hard_swish_clip": (
            [node("Add", ["c", "three"], ["a"]), node("Clip", ["a", "zero", "six"], ["k"]),
             node("Mul", ["c", "k"], ["p"]), node("Div", ["p", "six"], ["y"])],
            {"three": scalar(3), "zero": scalar(0), "six": scalar(6)}, 17),
        "hard_swish_clip_div_first": (
            [node("Add", ["three", "c"], ["a"]), node("Clip", ["a", "zero", "six"], ["k"]),
             node("Mul", ["k", "sixth"], ["p"]), node("Mul", ["p", "c"], ["y"])],
            {"three": scalar(3), "zero": scalar(0), "six": scalar(6), "sixth": scalar(1 / 6)}, 17),
        "gelu_erf": (
            [node("Div", ["c", "root2"], ["d"]), node("Erf", ["d"], ["e"]), node("Add", ["e", "one"], ["a"]),
             node("Mul", ["c", "a"], ["p"]), node("Mul", ["p", "half"], ["y"])],
            {"root2": scalar(2**0.5), "one": scalar(1), "half": scalar(0.5)}, 17),
        "gelu_erf_half_first": (
            [node("Mul", ["c", "half"], ["h"]), node("Mul", ["c", "inv_root2"], ["d"]), node("Erf", ["d"], ["e"]),
             node("Add", ["one", "e"], ["a"]), node("Mul", ["h", "a"], ["y"])],
            {"inv_root2": scalar(0.5**0.5), "one": scalar(1), "half": scalar(0.5)}, 17),
        "gelu_tanh_pattern": (
            [node("Pow", ["c", "cube"], ["q"]), node("Mul", ["q", "k"], ["r"]), node("Add", ["c", "r"], ["t"]),
             node("Mul", ["t", "root"], ["u"]), node("Tanh", ["u"], ["v"]), node("Add", ["v", "one"], ["a"]),
             node("Mul", ["c", "half"], ["h"]), node("Mul", ["h", "a"], ["y"])],
            {"cube": scalar(3), "k": scalar(0.044715), "root": scalar((2 / np.pi) ** 0.5), "one": scalar(1),
             "half": scalar(0.5)}, 17),
        "gelu": ([node("Gelu", ["c"], ["y"])], {}, 20),
        "gelu_tanh": ([node("Gelu", ["c"], ["y"], approximate="tanh")], {}, 20),
    }
    for name, (nodes, constants, opset) in cases.items():
        weights = {"w": rand(3, 2, 1, 1), "b": rand(3), **constants}
        case(f"activation_{name}", [node("Conv", ["x", "w", "b"], ["c"]), *nodes], weights,
             {"x": 3 * rand(1, 2, 3, 4)}, opset=opset)


def norm(channels):
    return {"g": rand(channels), "o": rand(channels), "m": rand(channels), "v": rand(channels) ** 2 + np.float32(0.1)}


def batch_norms():
    def bn(**attributes):
        return node("BatchNormalization", ["c", "g", "o", "m", "v"], ["y"], **attributes)

    case("bn_conv", [node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]), bn(epsilon=1e-3)],
         {"w": rand(4, 3, 3, 3), "b": rand(4), **norm(4)}, {"x": rand(1, 3, 4, 4)})
    case("bn_conv_no_bias_grouped", [node("Conv", ["x", "w"], ["c"], group=2), bn()],
         {"w": rand(4, 2, 2, 2), **norm(4)}, {"x": rand(1, 4, 4, 4)})
    case("bn_conv_transpose_grouped", [node("ConvTranspose", ["x", "w"], ["c"], group=2, strides=[2, 2]), bn()],
         {"w": rand(4, 3, 2, 3), **norm(6)}, {"x": rand(1, 4, 3, 3)})
    case("bn_gemm", [node("Gemm", ["x", "w", "b"], ["c"], alpha=0.5, beta=2.0), bn()],
         {"w": rand(5, 4), "b": rand(4), **norm(4)}, {"x": rand(3, 5)})
    case("bn_gemm_trans_b_no_bias", [node("Gemm", ["x", "w"], ["c"], transB=1), bn()],
         {"w": rand(4, 5), **norm(4)}, {"x": rand(3, 5)})
    case("bn_shared_weight", [node("Conv", ["x", "w"], ["c"]), bn(), node("Conv", ["x", "w"], ["z"])],
         {"w": rand(4, 3, 1, 1), **norm(4)}, {"x": rand(1, 3, 2, 2)}, outputs=("y", "z"))


def networks():
    """Two layers sharing a weight, then grouped int4-sized products: for quantize-dequantize export."""
    case("shared_weight",
         [node("MatMul", ["x", "w"], ["m"]), node("Relu", ["m"], ["r"]), node("MatMul", ["r", "w"], ["y"])],
         {"w": rand(8, 8)}, {"x": rand(3, 8)})
    case("qdq_opset21",
         [node("Conv", ["x", "cw", "cb"], ["c"]), node("Relu", ["c"], ["r"]), node("Flatten", ["r"], ["f"]),
          node("MatMul", ["f", "mw"], ["m"]), node("Gemm", ["m", "gw"], ["y"], transB=1)],
         {"cw": rand(3, 2, 2, 2), "cb": rand(3), "mw": rand(12, 16), "gw": rand(5, 16)},
         {"x": rand(2, 2, 3, 3)}, opset=21)


def batch_norms_after_matmul():
    """Made last, so that the random numbers above stay what they were."""
    bn = node("BatchNormalization", ["c", "g", "o", "m", "v"], ["y"])
    case("bn_matmul", [node("MatMul", ["x", "w"], ["c"]), bn], {"w": rand(5, 4), **norm(4)}, {"x": rand(3, 5)})
    case("bn_matmul_add", [node("MatMul", ["x", "w"], ["p"]), node("Add", ["b", "p"], ["c"]), bn],
         {"w": rand(5, 4), "b": rand(1, 4), **norm(4)}, {"x": rand(3, 5)})
    # The channels of a batch normalisation are dimension 1, which here is not the MatMul's.
    case("bn_along_a_sequence", [node("MatMul", ["x", "w"], ["c"]), bn],
         {"w": rand(5, 4), **norm(4)}, {"x": rand(2, 4, 5)})


if __name__ == "__main__":
    convolutions()
    products()
    activations()
    batch_norms()
    networks()
    batch_norms_after_matmul()
