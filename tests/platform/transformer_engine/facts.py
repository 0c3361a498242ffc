"""Versions and sizes that Transformer Engine asks for when it is imported or first used."""

FUNCTIONS = {
    "get_cublasLt_version": lambda: 130100,
    "get_cudnn_version": lambda: 91200,
    "get_num_cublas_streams": lambda: 4,
}
