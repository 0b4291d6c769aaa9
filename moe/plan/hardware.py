"""Peak rates of known accelerators, for MFU."""

PEAK_BF16_TFLOPS_PER_S = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "L40S": 362.0,
}
"""Dense bf16 tensor-core TFLOP/s with fp32 accumulation, from NVIDIA's data sheets (half of the
value "with sparsity"). Keys are parts of ``torch.cuda.get_device_name()``."""


def peak_tflops_per_s(device_name: str) -> float | None:
    """Return the peak of a device by the longest key in its name, or None."""
    words = device_name.replace("-", " ").lower()
    fitting = [key for key in PEAK_BF16_TFLOPS_PER_S if f" {key.lower()} " in f" {words} "]
    return PEAK_BF16_TFLOPS_PER_S[max(fitting, key=len)] if fitting else None
