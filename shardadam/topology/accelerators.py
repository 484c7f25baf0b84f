"""What compilers have to be told of accelerators that are not here: TPU's by variables, GPU's by a description."""

TPU_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # The default backend; TPU is compiled for without one.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",  # Else it asks a cloud's metadata server, and waits.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
GPU_ENVIRONMENT = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}

# NVIDIA H100 Tensor Core GPU Architecture (whitepaper, 2022), the SXM5 column, and the CUDA C++ Programming Guide's
# table of limits for compute capability 9.0. Memory is what the driver leaves of 80 GiB on such a card.
_H100 = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 48 * 1024,
    "shared_memory_per_block_optin": 227 * 1024,
    "shared_memory_per_core": 228 * 1024,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "memory_bandwidth": 3_352_320_000_000,
    "l2_cache_size": 50 * 1024 * 1024,
    "clock_rate_ghz": 1.98,
    "device_memory_size": 84_942_979_072,
    "device_address_bits": 64,
    "ecc_enabled": "true",
    "name": '"NVIDIA H100 80GB HBM3"',
    "device_vendor": '"NVIDIA Corporation"',
    "driver_version": '"13.0.0"',
    "runtime_version": '"12.8.0"',
    "compile_time_toolkit_version": '"12.8.0"',
    "dnn_version": '"9.10.0"',
}


def h100_config() -> str:
    """XLA's `GpuTargetConfigProto` of an H100 SXM with 80 GB, as text."""
    fields = "\n".join(f"  {name}: {value}" for name, value in _H100.items())
    capability = "  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }"
    links = "  device_interconnect_info { active_links: 18 }"
    return "\n".join(
        [
            "gpu_device_info {",
            fields,
            capability,
            links,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 patch: 0 }",
            'device_description_str: "NVIDIA H100 80GB HBM3"',
        ]
    )
