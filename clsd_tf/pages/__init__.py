"""Layout and plots of the HTML reports."""
