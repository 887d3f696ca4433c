"""Real messages of onnxruntime 1.31, and what is left of them."""

import pytest

from onnxcompress.runtime_messages import cause_of_death, informative_line

PATH = "/onnxruntime_src/onnxruntime/core"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            '[ONNXRuntimeError] : 10 : INVALID_GRAPH : This is an invalid model. In Node, ("n1", Foo, "", -1) : '
            '("x": tensor(float),) -> ("y": tensor(float),) , Error No Op registered for Foo with domain_version of 18',
            "node 'n1' (Foo): No Op registered for Foo with domain_version of 18",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Fatal error: my.dom:Foo(-1) is not a registered function/op",
            "my.dom:Foo(-1) is not a registered function/op",
        ),
        (
            f"[ONNXRuntimeError] : 1 : FAIL : Load model from /tmp/ir14.onnx failed:{PATH}/graph/model.cc:256 "
            "onnxruntime::Model::Model(onnx::ModelProto&&, const onnxruntime::PathString&, const "
            "onnxruntime::IOnnxRuntimeOpSchemaRegistryList*, const onnxruntime::logging::Logger&, const "
            "onnxruntime::ModelOptions&) Unsupported model IR version: 14, max supported IR version: 13\n",
            "Unsupported model IR version: 14, max supported IR version: 13",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape node. Name:'r' "
            f"Status Message: {PATH}/providers/cpu/tensor/reshape_helper.h:91 "
            "onnxruntime::ReshapeHelper::ReshapeHelper(const onnxruntime::TensorShape&, "
            "onnxruntime::TensorShapeVector&, bool) input_shape_size == requested_shape_size was false. The input "
            "tensor cannot be reshaped to the requested shape. Input shape:{6}, requested shape:{4,5}\n",
            "node 'r' (Reshape): input_shape_size == requested_shape_size was false. The input "
            "tensor cannot be reshaped to the requested shape. Input shape:{6}, requested shape:{4,5}",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running ConstantOfShape node. "
            f"Name:'' Status Message: {PATH}/common/safeint.h:17 static void SafeIntExceptionHandler<onnxruntime::"
            "OnnxRuntimeException>::SafeIntOnOverflow() Integer overflow\n",
            "node '' (ConstantOfShape): Integer overflow",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running MatMul node. Name:'' "
            "Status Message: matmul_helper.h:59 Compute MatMul dimension mismatch",
            "node '' (MatMul): MatMul dimension mismatch",
        ),
        (
            f"[ONNXRuntimeError] : 1 : FAIL : Exception during initialization: {PATH}/x.cc:12 onnxruntime::common::"
            "Status onnxruntime::F::Init(const T&) const [with T = std::vector<float>] a.size() == 1 was false. ",
            "a.size() == 1 was false.",
        ),
        (
            r"[ONNXRuntimeError] : 1 : FAIL : D:\a\_work\1\s\onnxruntime\core\graph\model.cc:256 "
            "onnxruntime::Model::Model Unsupported model IR version: 14 (limit 13)",
            "Unsupported model IR version: 14 (limit 13)",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : External data path validation failed for initializer: w. Error: "
            "tensorprotoutils.cc:461 ValidateExternalDataPathFromDir External data path does not exist: "
            '"/tmp/no.bin"',
            "External data path validation failed for initializer: w. Error: External data path does not exist: "
            '"/tmp/no.bin"',
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running If node. Name:'If_0' Status "
            "Message: Non-zero status code returned while running Pad node. Name:'else/Pad' Status Message: "
            "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Pad reflect requires more",
            "node 'If_0' (If): node 'else/Pad' (Pad): Pad reflect requires more",
        ),
        ("Required inputs (['x']) are missing.\nmore", "Required inputs (['x']) are missing."),
        ("\n \n", "no reason given"),
    ],
)
def test_informative_line(text, line):
    assert informative_line(text) == line


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (-11, "crashed (SIGSEGV)"),
        (-9, "crashed (SIGKILL; out of memory?)"),
        (3, "ended its process (exit status 3)"),
        (None, "stopped answering"),
    ],
)
def test_cause_of_death(status, text):
    assert cause_of_death(status) == text
