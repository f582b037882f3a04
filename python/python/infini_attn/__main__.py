"""`python -m infini_attn`: version and backends."""

from . import __version__, get_num_threads
from ._core import _cuda_status, simd_level


def main() -> None:
    print(f"infini_attn {__version__}")
    print(f"backends: cpu ({simd_level()}, {get_num_threads()} threads)")
    print(f"cuda: {_cuda_status()}")


if __name__ == "__main__":
    main()
