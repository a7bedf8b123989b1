"""Two traces side by side: what is aligned, and how far their flows agree."""
