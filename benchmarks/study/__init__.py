"""What layer attention and its skipping are worth: accuracy and time, over seeds, with everything else equal."""
