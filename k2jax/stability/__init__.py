"""The run that looks after itself: outliers and spikes seen in the recorded rows, and what is done about them."""
