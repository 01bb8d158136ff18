"""What every part may use: errors, files, progress, typed settings, and what things cost."""
