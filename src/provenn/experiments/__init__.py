"""What runs experiments: trials here and on other machines, at the paper's scale, and comparisons."""
