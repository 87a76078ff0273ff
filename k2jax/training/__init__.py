"""What the trainer does: state, step, placement, compiled program, metrics, validation."""
