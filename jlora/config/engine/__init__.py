"""What sections are built with: conversion, faults, the YAML loader, and their text."""
