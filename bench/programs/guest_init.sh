#!/bin/sh
# The first program of a guest: it answers lines. A file is named by its number in
# the list of all, and in the archive of a name by its number there.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo -onlcr
echo "ready>"
while read -r word name; do
  case $word in
    sum) md5sum </files/$name ;;
    count) ls /files | wc -l ;;
    write) echo "$name" >>/tmp/written; md5sum </tmp/written ;;
    unpack)
      mkdir /tmp/$name
      tar -xzvf /archives/$name -C /tmp/$name | md5sum ;;
    read) cat /tmp/$name/* | md5sum ;;
    awk) awk -v given="$name" -f /work.awk ;;
  esac
done
