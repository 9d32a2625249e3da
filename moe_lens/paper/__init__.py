"""What the scripts of analyses/ share."""
