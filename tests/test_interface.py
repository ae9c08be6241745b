"""The public names, the attributes that callers read, targets, and what an import costs."""

import enum
import inspect
import json
import os
import subprocess
import sys

import pytest
import torch

import bitblas
from bitblas import Linear, Matmul, MatmulConfig

CLASS, FUNCTION, ENUM, TEXT, OBJECT = "class", "function", "enum", "text", "object"
NAMES = {
    "__version__": TEXT,
    "Matmul": CLASS,
    "MatmulConfig": CLASS,
    "MatmulWithSplitK": CLASS,
    "MatmulConfigWithSplitK": CLASS,
    "Linear": CLASS,
    "quantize_activation": FUNCTION,
    "set_log_level": FUNCTION,
    "auto_detect_nvidia_target": FUNCTION,
    "utils.auto_detect_nvidia_target": FUNCTION,
    "utils.target_detector.auto_detect_nvidia_target": FUNCTION,
    "cache.global_operator_cache": OBJECT,
    "cache.OperatorCache": CLASS,
    "cache.load_global_ops_cache": FUNCTION,
    "cache.get_database_path": FUNCTION,
    "cache.set_database_path": FUNCTION,
    "quantization.gen_quant4": FUNCTION,
    "quantization.general_compress": FUNCTION,
    "quantization.interleave_weight": FUNCTION,
    "quantization.utils.gen_quant4": FUNCTION,
    "quantization.utils.general_compress": FUNCTION,
    "quantization.utils.interleave_weight": FUNCTION,
    "module.Linear": CLASS,
    "module.BITBLAS_DATABASE_PATH": TEXT,
    "module.unpack_qweight": FUNCTION,
    "module.unpack_qzeros": FUNCTION,
    "module.unpack_qzeros_v2": FUNCTION,
    "ops.Operator": CLASS,
    "ops.OperatorConfig": CLASS,
    "ops.Matmul": CLASS,
    "ops.MatmulConfig": CLASS,
    "ops.QuantCompress": CLASS,
    "ops.QuantCompressConfig": CLASS,
    "ops.LOP3Permutate": CLASS,
    "ops.LOP3PermutateConfig": CLASS,
    "ops.LadderPermutate": CLASS,
    "ops.LadderPermutateConfig": CLASS,
    "base.TransformKind": ENUM,
    "base.OptimizeStrategy": ENUM,
    "base.BackendKind": ENUM,
    "testing.main": FUNCTION,
    "testing.torch_assert_close": FUNCTION,
    "testing.requires_cuda_compute_version": FUNCTION,
    "testing.requires_package": FUNCTION,
    "FlashAtten": CLASS,
    "FlashAttenConfig": CLASS,
}
CODE = """
import json, sys
import torch
before = set(sys.modules)
import bitblas
from bitblas.module import BITBLAS_DATABASE_PATH

def kind(path):
    import enum, inspect
    value = bitblas
    for name in path.split("."):
        value = getattr(value, name)
    if inspect.isclass(value):
        return "enum" if issubclass(value, enum.Enum) else "class"
    return "function" if callable(value) else "text" if isinstance(value, str) else "object"

result = {
    "kinds": {name: kind(name) for name in json.loads(sys.argv[1])},
    "new": sorted({name.split(".")[0] for name in set(sys.modules) - before}),
    "cuda": torch.cuda.is_initialized(),
    "path": BITBLAS_DATABASE_PATH,
}
print(json.dumps(result), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def fresh_import(tmp_path_factory):
    """What a process that does nothing but `import bitblas` after torch sees."""
    path = str(tmp_path_factory.mktemp("database"))
    environment = {**os.environ, "BITBLAS_DATABASE_PATH": path}
    run = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(list(NAMES))],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return {**json.loads(run.stderr.splitlines()[-1]), "stdout": run.stdout, "expected_path": path}


def lookup(path):
    value = bitblas
    for name in path.split("."):
        value = getattr(value, name)
    return value


# --- names


@pytest.mark.parametrize("name", NAMES)
def test_name_after_a_bare_import(name, fresh_import):
    assert fresh_import["kinds"][name] == NAMES[name]


def test_import_is_silent(fresh_import):
    assert fresh_import["stdout"] == ""


@pytest.mark.parametrize("package", ["triton", "llvmlite", "numba", "pytest", "safetensors"])
def test_import_brings_no(package, fresh_import):
    assert package not in fresh_import["new"]


def test_import_brings_little_beside_itself_and_torch(fresh_import):
    third_party = {
        name
        for name in fresh_import["new"]
        if name not in sys.stdlib_module_names and not name.startswith(("_", "torch"))
    }
    assert third_party <= {"bitblas", "platformdirs", "numpy"}


def test_import_does_not_touch_the_gpu(fresh_import):
    assert not fresh_import["cuda"]


def test_database_path_of_the_environment_reaches_the_module_constant(fresh_import):
    assert fresh_import["path"] == fresh_import["expected_path"]


def test_version_is_later_than_what_callers_ask_for():
    release = tuple(int(part) for part in bitblas.__version__.split(".")[:3])
    assert release >= (0, 2, 0)


@pytest.mark.parametrize(
    ("kind", "members"),
    [
        (
            "base.TransformKind",
            {
                "NonTransform": 0,
                "InterWarpTransform": 1,
                "IntraWarpTransform": 2,
                "LDMatrixTransform": 3,
            },
        ),
        (
            "base.OptimizeStrategy",
            {"SingleBatchDecodeOnly": 0, "ContigousBatching": 1, "ContiguousBatching": 1},
        ),
    ],
)
def test_members_of_enumeration(kind, members):
    assert issubclass(lookup(kind), enum.IntEnum)
    assert {name: int(value) for name, value in lookup(kind).__members__.items()} == members


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Matmul", "config name target enable_tuning from_database backend"),
        (
            "Linear",
            "in_features out_features bias A_dtype W_dtype accum_dtype out_dtype group_size "
            "with_scaling with_zeros zeros_mode opt_M enable_tuning fast_decoding propagate_b",
        ),
        ("Linear.load_and_transform_weight", "self weight scales zeros bias"),
        ("Linear.repack_from_gptq", "self gptq_module device"),
        ("Linear.forward", "self A output"),
        ("Matmul.transform_weight", "self weight scale zeros bias"),
        ("Matmul.hardware_aware_finetune", "self topk target parallel_build"),
        ("Matmul.profile_latency", "self dynamic_symbolic_constraints"),
        ("quantization.gen_quant4", "k n groupsize"),
        ("quantization.general_compress", "lowprecision_weight source_bits storage_dtype"),
        ("testing.torch_assert_close", "tensor_a tensor_b rtol atol max_mismatched_ratio"),
        ("auto_detect_nvidia_target", "gpu_id"),
        ("set_log_level", "level"),
        (
            "FlashAttenConfig",
            "batch heads kv_heads seq_len dim Q_dtype K_dtype V_dtype Accu_dtype Out_dtype "
            "layout is_causal",
        ),
    ],
)
def test_leading_parameters(name, parameters):
    found = list(inspect.signature(lookup(name)).parameters)
    assert found[: len(parameters.split())] == parameters.split()


def test_operator_is_registered_with_torch():
    assert Matmul(MatmulConfig(1, 32, 64), target="cpu").lib is torch.ops.bitblas.matmul


# --- attributes


def matmul(**fields):
    defaults = {"M": [1, 16], "N": 32, "K": 64, "W_dtype": "uint4", "group_size": 32}
    return Matmul(MatmulConfig(**{**defaults, "with_scaling": True, **fields}), target="cpu")


@pytest.mark.parametrize("field", MatmulConfig.__dataclass_fields__)
def test_field_of_the_config_reads_as_an_attribute_of_the_operator(field):
    operator = matmul(with_bias=True)
    assert getattr(operator, field) == getattr(operator.config, field)


@pytest.mark.parametrize(
    ("W_dtype", "bit", "source_format"),
    [
        ("uint1", 1, "uint"),
        ("uint8", 8, "uint"),
        ("int1", 1, "int"),
        ("int4", 4, "int"),
        ("nf4", 4, "nf"),
        ("fp4_e2m1", 4, "fp"),
        ("e4m3_float8", 8, "fp_e4m3"),
        ("e5m2_float8", 8, "fp_e5m2"),
        ("float16", 16, "fp"),
        ("bfloat16", 16, "bf"),
    ],
)
def test_bit_and_source_format(W_dtype, bit, source_format):
    operator = matmul(W_dtype=W_dtype)
    assert (operator.bit, operator.source_format) == (bit, source_format)
    assert operator.BITBLAS_TRICK_DTYPE_MAP[W_dtype] == (source_format, bit)


def test_lut_is_the_table_of_nf4_and_none_for_others():
    lut = matmul(W_dtype="nf4").lut
    assert lut.shape == (16,)
    assert (lut[0].item(), lut[7].item(), lut[15].item()) == (-1, 0, 1)
    assert matmul().lut is None


def test_operator_attributes():
    operator = matmul()
    assert operator.name == "matmul"
    assert operator.target == operator.target.arch == "cpu"
    assert operator.lib is not None
    assert callable(operator.torch_func)
    assert operator.input_transform is None
    A = torch.zeros(1, 64)
    assert operator.transform_input(A) is A


def test_target_that_is_given_and_its_architecture():
    operator = Matmul(MatmulConfig(1, 32, 64), name="mine", target="cuda -arch=sm_90")
    assert operator.name == "mine"
    assert operator.target == "cuda -arch=sm_90"
    assert operator.target.arch == "sm_90"


@pytest.mark.parametrize(("M", "expected"), [(16, None), ([16, 1], {"m": (1, 16)})])
def test_dynamic_range(M, expected):
    assert matmul(M=M).dynamic_range == expected


@pytest.mark.parametrize("backend", ["tir", "tl", *bitblas.base.BackendKind])
def test_backend_names_of_the_original_are_accepted(backend):
    Matmul(MatmulConfig(1, 32, 64), target="cpu", backend=backend)


@pytest.mark.parametrize("argument", ["kenrel_only", "kernel_only"])
def test_get_source_is_text(argument):
    assert "def " in matmul().get_source(**{argument: True})


def test_profile_latency_and_finetuning_on_the_cpu():
    operator = matmul()
    operator.hardware_aware_finetune(topk=2, target="cpu", parallel_build=True)
    assert operator.profile_latency() > 0
    assert operator.profile_latency({"m": 3}) > 0
    operator.cleanup()


def test_linear_attributes():
    module = Linear(64, 32, W_dtype="uint4", group_size=32, with_scaling=True, opt_M=[16, 1])
    assert (module.in_features, module.out_features) == (64, 32)
    assert (module.opt_M, module.group_size) == ((1, 16), 32)
    assert module.torch_dtype is torch.float16
    assert (module.bits, module.source_format, module.zeros_mode) == (4, "uint", "original")
    assert isinstance(module.bitblas_matmul, Matmul)
    assert not module.consistent and not module.is_consitent


def test_linear_of_one_dtype_is_consistent():
    module = Linear(64, 32)
    assert module.consistent and module.is_consitent


# --- targets


@pytest.mark.parametrize("owner", ["", "utils", "utils.target_detector"])
@pytest.mark.parametrize("answer", ["cuda -arch=sm_80", "cpu"])
def test_detection_that_a_caller_replaced_is_looked_up_when_called(owner, answer, monkeypatch):
    module = lookup(owner) if owner else bitblas
    monkeypatch.setattr(module, "auto_detect_nvidia_target", lambda gpu_id=0: answer)
    assert Matmul(MatmulConfig(1, 32, 64)).target == answer
    assert Linear(64, 32).bitblas_matmul.target == answer


def test_replaced_detection_that_answers_with_a_device_tag(monkeypatch):
    detected = bitblas.auto_detect_nvidia_target()
    monkeypatch.setattr(bitblas, "auto_detect_nvidia_target", lambda gpu_id=0: "nvidia/nvidia-a100")
    assert Matmul(MatmulConfig(1, 32, 64)).target == detected
    assert Matmul(MatmulConfig(1, 32, 64), target="nvidia/nvidia-a100").target == detected


def test_detection_names_the_architecture_or_the_cpu():
    target = bitblas.auto_detect_nvidia_target()
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        assert target == f"cuda -arch=sm_{major}{minor}"
    else:
        assert target == "cpu"
