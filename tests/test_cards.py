"""Which table of configurations a card gets, and which of its blocks, with stand-ins for cards."""

from types import SimpleNamespace

import pytest
import torch
from fastdpo_kernels import linear_logprob
from fastdpo_kernels.backends import choose_backend, explain_backend
from fastdpo_kernels.head import Head
from fastdpo_kernels.triton import configs, logits

from fastdpo import TrainConfig
from fastdpo.doctor import report
from fastdpo.model.paths import head_path

CUDA = torch.device("cuda")
NVIDIA = {
    "V100": ((7, 0), 96, None),
    "T4": ((7, 5), 64, None),
    "A100": ((8, 0), 163, "sm_80"),
    "RTX 3090": ((8, 6), 99, "sm_80"),
    "RTX 4090": ((8, 9), 99, "sm_80"),
    "H100": ((9, 0), 227, "sm_90"),
    "B200": ((10, 0), 227, "sm_100"),
    "B300": ((10, 3), 227, "sm_100"),
    "RTX 5090": ((12, 0), 99, "sm_120"),
    "GB10": ((12, 1), 99, "sm_120"),
    "of tomorrow": ((13, 0), 227, "sm_120"),
}
AMD = {"gfx942": 64, "gfx950": 160, "gfx1100": 64, "gfx1201": 64}


@pytest.fixture
def install(monkeypatch):
    """A function that puts a GPU, as torch tells of it, into this machine."""

    def put(capability=(9, 4), optin=0, plain=48, arch=""):
        properties = SimpleNamespace(
            name="a card",
            total_memory=80 << 30,
            shared_memory_per_block=plain << 10,
            multi_processor_count=100,
        )
        if arch:
            properties.gcnArchName = arch
        else:  # ROCm's torch does not have it
            properties.shared_memory_per_block_optin = optin << 10
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", "6.4" if arch else None)

    return put


def room(config, kind):
    return configs.shared_bytes(config, 4 if kind in ("float32", "columns") else 2)


@pytest.mark.parametrize("name", NVIDIA)
def test_nvidia(name, install):
    capability, kib, table = NVIDIA[name]
    install(capability, kib)
    choice = explain_backend("auto", CUDA)
    if table is None:
        assert choice.name == "torch"
        assert choice.reason == (
            f"compute capability {capability[0]}.{capability[1]}, and the fused kernels need 8.0"
        )
        return
    assert choice.name == "triton" and choice.reason.startswith(f"fused kernels, blocks of {table}")
    own = table == f"sm_{capability[0]}{capability[1]}"
    assert ("for compute capability" in choice.reason) is not own
    assert "smaller" not in choice.reason  # the first choice of a card in the list fits it
    for kind, family in configs.TABLE[table].items():
        fitting = configs.candidates(CUDA, kind)
        assert fitting == tuple(c for c in family if room(c, kind) <= kib << 10)
        assert fitting[0] == family[0]


@pytest.mark.parametrize("name", AMD)
def test_amd(name, install):
    install(arch=f"{name}:sramecc+:xnack-", plain=AMD[name])
    assert explain_backend("auto", CUDA) == ("triton", f"fused kernels, blocks of {name}")
    for kind in configs.TABLE[name]:
        fitting = configs.candidates(CUDA, kind)
        assert fitting[0] == configs.TABLE[name][kind][0]
        assert not any(config.descriptors or config.persistent for config in fitting)


def test_unknown_amd(install):
    install(arch="gfx906", plain=64)
    choice = explain_backend("auto", CUDA)
    assert choice.name == "torch" and "gfx906" in choice.reason and "gfx942" in choice.reason


@pytest.mark.parametrize("kind", ["xpu", "mps", "meta"])
def test_other_devices(kind):
    device = torch.device(kind)
    assert explain_backend("auto", device) == ("torch", f"no fused kernels for {kind}")


@pytest.mark.parametrize("kind", ["meta", "xpu", "T4", "gfx906"])
def test_triton_asked_for_where_it_cannot_run_is_one_line(kind, install):
    if kind == "T4":
        install((7, 5), 64)
    elif kind == "gfx906":
        install(arch=kind, plain=64)
    device = CUDA if kind in ("T4", "gfx906") else torch.device(kind)
    reason = explain_backend("auto", device).reason
    with pytest.raises(ValueError, match=r"no fused kernels|compute capability") as error:
        choose_backend("triton", device)
    assert str(error.value) == f'backend "triton": {reason}; use "torch"'
    assert "\n" not in reason
    assert choose_backend("torch", device) == "torch"
    assert choose_backend("naive", device) == "naive"


def test_triton_asked_for_through_the_public_function(monkeypatch):
    monkeypatch.setattr("fastdpo_kernels.backends._interpreted", lambda: False)
    x, w, y = torch.randn(3, 32), torch.randn(64, 32), torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match='backend "triton": no GPU'):
        linear_logprob(x, w, y, backend="triton")
    assert linear_logprob(x, w, y).shape == (3,)


@pytest.mark.parametrize(("arch", "precision"), [("", "tf32x3"), ("gfx942", "ieee")])
def test_fp32_is_exact_on_every_card(arch, precision, install):
    """AMD's matrix cores multiply fp32 as it is; NVIDIA's make it of three tf32 products."""
    install((9, 0), 227, arch=arch)
    assert logits._precision(SimpleNamespace(device=CUDA, dtype=torch.float32)) == precision
    assert logits._precision(SimpleNamespace(device=CUDA, dtype=torch.bfloat16)) == "ieee"


@pytest.mark.parametrize("width", [8, 15])
def test_what_the_fused_kernels_lack_is_said(width, install):
    install((9, 0), 227)
    assert explain_backend("auto", CUDA, width=width) == (
        "torch",
        "the fused kernels need H of 16 or more",
    )
    assert explain_backend("auto", CUDA, torch.float64) == (
        "torch",
        "the fused kernels have no fp64",
    )
    assert explain_backend("auto", torch.device("cpu")).reason == "the fused kernels are for GPUs"


def test_a_card_of_48_kib_takes_smaller_blocks(install):
    install((8, 0), 48)
    choice = explain_backend("auto", CUDA)
    assert choice.name == "triton" and "48 KiB of shared memory" in choice.reason
    for kind in configs.TABLE["sm_80"]:
        best = configs.candidates(CUDA, kind)[0]
        assert room(best, kind) <= 48 << 10
    assert configs.candidates(CUDA, "wide")[0] != configs.TABLE["sm_80"]["wide"][0]


def test_a_newer_card_skips_tables_that_do_not_fit(install, monkeypatch):
    big = configs.Config(128, 256, 64, 8, 4)
    monkeypatch.setitem(configs.TABLE, "sm_130", {"wide": (big,), "narrow": (big,)})
    install((13, 0), 99)
    assert configs.card(CUDA) == "sm_120"
    install((13, 0), 512)
    assert configs.card(CUDA) == "sm_130"


def test_a_card_that_fits_nothing_takes_the_portable_path(install):
    install((9, 0), 8, plain=8)
    choice = explain_backend("auto", CUDA)
    assert choice.name == "torch" and "8192 bytes of shared memory" in choice.reason
    assert choose_backend("auto", CUDA) == "torch"


def test_families_get_smaller_towards_the_end():
    for name, entry in configs.TABLE.items():
        for kind, family in entry.items():
            least = min(room(config, kind) for config in family)
            assert room(family[-1], kind) == least, (name, kind)


def test_what_a_configuration_is_chosen_for(install):
    install((12, 0), 99)
    x, w = torch.empty(2, 64, dtype=torch.bfloat16), torch.empty(8, 64, dtype=torch.bfloat16)
    assert configs.family(Head(w), x) == "narrow"
    assert configs.family(Head(w, softcap=30.0), x) == "full"
    assert configs.family(Head(w, w[:, 0]), x) == "rich"
    assert configs.family(Head(w, w[:, 0]), x, ("entropy",)) == "full"
    assert configs.family(Head(w), x, ("entropy",), online=True) == "rich"
    assert configs.family(Head(w), x, descriptors=False) == "pointers"
    assert configs.family(Head(w[:, :40]), x[:, :40]) == "pointers"  # no multiple of 16
    assert configs.family(Head(torch.empty(64, 8, dtype=x.dtype).T), x) == "columns"
    assert configs.family(Head(w.float()), x.float()) == "float32"


def test_a_run_and_doctor_say_which(install):
    config = TrainConfig(model_name_or_path=None, bf16=False)
    install((8, 9), 99)
    line = head_path(config)
    assert line == "triton: fused kernels, blocks of sm_80 for compute capability 8.9"
    assert line in report(config)
    install((7, 5), 64)
    line = head_path(config)
    assert line.startswith("torch: in pieces of at most")
    assert line.endswith("(compute capability 7.5, and the fused kernels need 8.0)")
    assert line in report(config)
