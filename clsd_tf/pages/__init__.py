"""What the HTML reports share: layout and plots."""
