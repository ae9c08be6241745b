"""GPU kernels: a file holds one family; nothing here is imported before a GPU product runs."""
