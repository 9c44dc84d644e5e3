"""What `fashion_quality.py` and `head_to_head.py` measure samples of Fashion-MNIST by."""
