# lb1.lab.test: read by Debian's installer, in its own small shell, at three points: begin, choose_disks, finish.
for word in $(cat /proc/cmdline); do
    case $word in posthouse.*=*) eval "${word#posthouse.}" ;; esac
done

say() {
    echo "<2>posthouse: $*" >/dev/kmsg
}

# tell PATH [WGET OPTION…]: talks to the server under the machine's one-time token, by the pinned CA only.
tell() {
    path=$1
    shift
    wget --quiet --output-document=- --content-on-error --tries=5 --retry-connrefused --timeout=60 \
        --ca-certificate=/tmp/posthouse-ca.pem --header="Authorization: Bearer $token" "$@" "$server/node/$node/$path"
}

# It stays as it is, so that whoever comes can read why; with the power back on it is tried again.
give_up() {
    say "NOT INSTALLED: $*"
    [ -z "$token" ] || tell failed --post-data="$*" >/dev/null
    while :; do sleep 3600; done
}

begin() {
    wget --quiet --output-document=/tmp/posthouse-ca.pem --tries=30 --retry-connrefused "$plain/ca.pem"
    echo "$ca  /tmp/posthouse-ca.pem" | sha256sum -c >/dev/null 2>&1 ||
        give_up "the CA certificate at $plain is not the one that the boot script pins"
}

# As `lsblk --json` says it, of which the installer has none.
disks() {
    comma=
    echo '{"blockdevices": ['
    for block in /sys/block/*; do
        [ -e "$block/device" ] || continue
        name=${block##*/}
        case $name in sr* | fd* | mtd*) continue ;; esac
        found=$(udevadm info --query=property --name="/dev/$name")
        # udev writes a blank as \x20; whatever else JSON would stumble over is left out.
        property() { printf '%s\n' "$found" | sed -n "s/^$1=//p" | sed 's/\\x20/ /g' | tr -d '"\\'; }
        model=$(property ID_MODEL_ENC)
        serial=$(property ID_SCSI_SERIAL)
        serial=${serial:-$(property ID_SERIAL_SHORT)}
        serial=${serial:-$(cat "$block/serial" 2>/dev/null)}
        holds=$(property ID_PART_TABLE_TYPE)
        holds=${holds:-$(property ID_FS_TYPE)}
        protected=false
        [ "$(cat "$block/ro")" = 0 ] || protected=true
        removable=false
        [ "$(cat "$block/removable")" = 0 ] || removable=true
        echo "$comma"'{"name": "'"$name"'", "type": "disk", "size": '$(($(cat "$block/size") * 512))',
            "model": "'"$model"'", "serial": "'"$serial"'", "pttype": "'"$holds"'", "ro": '$protected', "rm": '$removable'}'
        comma=,
    done
    echo ']}'
}

choose_disks() {
    firmware=bios
    [ -d /sys/firmware/efi ] && firmware=efi
    udevadm settle
    {
        echo "firmware $firmware"
        while read -r key value _; do [ "$key" = MemTotal: ] && echo "memory_kib $value"; done </proc/meminfo
        echo disks
        disks
    } >/tmp/posthouse-report
    # What the server refuses, it notes itself. It answers with the devices to write, and nothing else.
    chosen=$(tell hardware --post-file=/tmp/posthouse-report) || { reason=$chosen; token=; give_up "${reason:-no answer}"; }
    echo "$chosen" >/tmp/posthouse-disks
    say "to be written: $chosen"
    debconf-set partman-auto/disk "$chosen"
    debconf-set grub-installer/bootdev "$chosen"
    tell phase --post-data="running the installer" >/dev/null
}

finish() {
    read -r first second </tmp/posthouse-disks
    # The installer fills one EFI partition of the two. Started by either disk, it is the same machine.
    if [ -d /sys/firmware/efi ]; then
        case $first in *[0-9]) first=${first}p second=${second}p ;; esac
        sync
        umount /target/boot/efi
        dd if="${first}1" of="${second}1" bs=1M
        mount "${first}1" /target/boot/efi
    fi
    mkdir -p -m 0700 /target/root/.ssh
    tell identity | tar -x -C /target || give_up "its identity cannot be written"
    # Network and interface names come with the identity; the installer's own were for the installation.
    : >/target/etc/network/interfaces
    in-target update-initramfs -u || give_up "its initramfs cannot be made"
    tell installed --post-file=/target/etc/ssh/ssh_host_ed25519_key.pub >/dev/null ||
        give_up "the server did not take its host key"
}
