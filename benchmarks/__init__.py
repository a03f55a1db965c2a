"""Speed, memory and numerical error at full size."""
