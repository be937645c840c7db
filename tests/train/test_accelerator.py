"""What a GPU must do as a CPU does, on a GPU if there is one: scripts/check_gpu.sh runs these tests there."""
